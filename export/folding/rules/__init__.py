"""The fold rules, one file each; their order is the table `RULES` in `lowprec.export.folding`."""
