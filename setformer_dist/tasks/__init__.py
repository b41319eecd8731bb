"""What a run can learn, one file each; `setformer_dist.core.task` is the interface.

average_precision.py  COCO's figures of detections
build.py            the task that a config names
classification.py   one class per sample
detection.py        boxes around objects, and their classes
distilled.py        any of them, learnt from a trained model as well
losses.py           what both of them may take for a loss
mae.py              nothing of samples but themselves: hidden parts of images
masked_text.py      hidden tokens of texts
multilabel.py       any number of labels per sample
regression.py       a number for each sample
segmentation.py     a class for every pixel
sentences.py        one class per text, scored as GLUE does
"""
