"""One run: its config, its parts, what begins, continues and ends it, and its trained weights.

compiled.py          [compile]: what is refused, where compiled code is kept
compose.py           the composition root: every part of a run is built here
config.py            one TOML file -> RunConfig -> ResolvedRun for a number of ranks
detected.py          pictures of images with their boxes and with those that a trained model finds, for the report
distill.py           the teacher of a run
memory.py            what a rank will take of its memory, and the policy that keeps it within a budget
dry_run.py           what a run would be and cost, checked as far as a run checks before its first step
features.py          what frozen features know of classes: a linear probe and nearest neighbours
identity.py          what a run's checkpoints belong to
imported.py          how a run resumes from a checkpoint that `setformer ckpt import` has put into its folder
initial_weights.py   weights that a new run begins with: model.weights, model.skip
texts.py             what a trained model says of texts
inputs.py            what a run reads, behind one interface: images, or token sequences
keys.py              every key of a run config with type, default, unit and meaning
models.py            every architecture that this package registers with timm, with its size and cost
objective.py         the model of a run as its task needs it, alone or within an autoencoder
outcome.py           what rank 0 leaves behind when training ends: summary.json and report.html in the run's folder
own_code.py          a user's own modules: run.imports, --import
own_model.py         models that a program gives as objects
picture_files.py     files of the masks or boxes that a trained model predicts
periodic_probe.py    a probe of the features while a run trains
probe.py             what `setformer doctor --hosts` has every host run: an all-reduce, and a look at the data
reconstructions.py   pictures of what a masked autoencoder reconstructs
refit_by_ray.py      rank 0's end of reference sets that a service on a Ray cluster computes
repeat.py            a new run with the config of another one (`setformer train --from`), and what differs now
sequence.py          parallel.sequence: whether model and data allow it, and each rank's rows
session.py           one rank's part of a run, for launch.entry and for the library
store.py             which checkpoints a run may resume from, and what it adds to those that it writes
timm_weights.py      weights in timm's layout for a model of another size or another number of classes
scored_texts.py      texts with what is true of them and what a trained model says, for the report
segmented.py         pictures of images with their masks and with those of a trained model, for the report
trained.py           a trained checkpoint used by one process: eval, predict, the report's pictures
exported.py          an exported model, ours or timm's, used likewise
"""
