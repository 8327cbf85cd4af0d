"""What a run folder says about itself, and how runs are listed and compared."""
