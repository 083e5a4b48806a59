"""Running text as examples of a language-model objective: corpus, order, objectives, rows."""
