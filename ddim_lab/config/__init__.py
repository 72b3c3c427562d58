"""What conf/ may say: typed, strict, checked before any work starts. Needs no torch.

options   the types that options are written in
folders   where YAML files lie: ours, and those of installed packages
found     things that have a name: our files, and what packages bring
data, kinds, metrics, sampler    options of what the rooms above bring: data sets, tasks, metrics, samplers
model, schedule, training, runtime, study    the other groups of conf/
job       all of them: one job
trust     what a configuration may make Hydra do
"""
