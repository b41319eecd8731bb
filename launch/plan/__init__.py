"""`setformer plan`: what a run would need and how fast it would be on machines that are not there."""
