"""From bytes to augmented pixels, keyed by (seed, epoch, sample).

augment.py      changes of colours and content after crop and flip, by torchvision's kernels
colours.py      the colours in which classes are drawn
decode.py       from image bytes to pixels, strictly: what is damaged is refused, never shown half
depth.py        what a pixel is: bands, numbers, and how many an image may have
draws.py        randomness as a function of (seed, epoch, sample, purpose), for many at once
formats.py      the image formats that are read: one list for everything
mixing.py       mixup and CutMix: who mixes with whom
tiff.py         TIFF and GeoTIFF of any depth and number of bands, strictly
transforms.py   from a stored sample to what a model is shown of it, for training and for evaluation
own.py          augmentations of a user's own, by name: functions of an image and a key
view.py         what part of a stored image is seen, and where: one value that image, mask and boxes all follow
"""
