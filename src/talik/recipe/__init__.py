"""What a run is asked to do (Recipe) and how it does it (Plan)."""
