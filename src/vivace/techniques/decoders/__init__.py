"""From progress to rows, from outputs to progress."""
