"""ImageNet's mean and standard deviation, RGB in [0, 1], by which all images are normalised."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
