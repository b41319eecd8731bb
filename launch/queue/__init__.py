"""A queue of training jobs for a cluster that several people share (`setformer queue`, docs/queue.md).

    state       what the policy sees and says
    order       who comes first: starved, priority, fair share, arrival
    timeline    free slots over time, and which nodes a job gets
    room        whom a job of higher priority stops, or shrinks
    policy      one decision: a pure function
    config      queue.toml: users, shares, limits, nodes
    schema      the tables, and how an older database becomes the present one
    store       the database: jobs, attempts, nodes, events, the schedulers' lease
    keeper      the process that starts a job, outlives the scheduler, and writes how the job ended
    attempts    start, watch and stop jobs by the files of their keepers
    outcome     what the end of an attempt means: done, the job's failure, or the machine's
    nodes       the nodes of this machine, of a list of hosts, or of a Ray cluster
    scheduler   the loop: hold the lease, observe, decide, act
    submit      check a job and put it into the queue
    wishes      cancel, hold, release, move, drain
    book        rows of the database to values of the policy, and decisions to rows
    serve       the server, also where `submit` has to start it
    show        tables for the terminal

Nothing here imports torch. Each job is an ordinary `setformer train` under its own supervisor.
"""
