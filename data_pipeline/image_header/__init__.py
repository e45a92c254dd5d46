"""Read height, width and orientation from an image's first bytes: `read` for any image, below it a file per format."""
