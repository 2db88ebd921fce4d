"""Other people's files into raw datasets: UK Biobank's Dixon archives, and the layouts of the field."""
