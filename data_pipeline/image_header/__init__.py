"""Read height, width and orientation from an image's first bytes: `read` for any image, and one file per format."""
