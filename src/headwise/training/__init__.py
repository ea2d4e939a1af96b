"""What recipes share: fields, comparison and task, training, the run's directory and record."""
