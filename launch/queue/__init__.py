"""A queue of training jobs for a cluster that several people share (`setformer queue`, docs/queue.md).

state.py       what the policy sees and says
order.py       who comes first: starved, priority, fair share, arrival
timeline.py    free slots over time, and which nodes a job gets
room.py        whom a job of higher priority stops, or shrinks
policy.py      one decision: a pure function
config.py      queue.toml: users, shares, limits, nodes
settings.py    queue.toml while a server runs: read again when it changes
schema.py      the tables, and how an older database becomes the present one
store.py       the database: jobs, attempts, nodes, events, the schedulers' lease
keeper.py      the process that starts a job, outlives the scheduler, and writes how the job ended
attempts.py    start, watch and stop jobs by the files of their keepers
outcome.py     what the end of an attempt means: done, the job's failure, or the machine's
nodes.py       the nodes of this machine, of a list of hosts, or of a Ray cluster
scheduler.py   the loop: hold the lease, observe, decide, act
submit.py      check a job and put it into the queue
sweeps.py      sweeps as jobs
wishes.py      cancel, hold, release, move, drain
book.py        rows of the database to values of the policy, and decisions to rows
serve.py       the server, also where `submit` has to start it
show.py        tables for the terminal
source.py      what people see and change of a queue, by its database
remote.py      the same by the JSON API of its server
token.py       the token of the page
pace.py        how long decisions take
page/          the page, the JSON API and the figures for Prometheus

Nothing here imports torch. Each job is an ordinary `setformer train` or `setformer sweep`.
"""
