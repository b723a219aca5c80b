"""The verbs as functions for programs and notebooks: checkpoints and data in memory."""
