"""What is annotated in images for dense tasks: objects with boxes and masks."""
