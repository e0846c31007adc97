"""The recipe (what is trained, on what) and the plan (how it is carried out)."""
