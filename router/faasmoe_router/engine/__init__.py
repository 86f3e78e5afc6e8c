"""The inference engine: schedules, samples and detokenizes sequences over a batching backend."""
