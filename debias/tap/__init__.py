"""What watches the losses, rows and heads of a step; knows torch only."""
