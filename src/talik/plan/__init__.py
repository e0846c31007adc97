"""Plans: how a run is carried out, chosen before a weight is loaded."""
