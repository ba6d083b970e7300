"""Several processes on one task: started, listened to, stopped, and their sums made."""
