"""Images to batches: index (what is there), order (which and how cut), pipelines (DALI), loader (torch)."""
