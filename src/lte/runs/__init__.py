"""Methods compared at equal training: methods x sparsities x seeds from one YAML file, a result record each."""
