"""Systems that change how layers run during generation."""
