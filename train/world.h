// A rank's way into a run and out of it: meets the others, agrees with them that everything is
// there, and trains.
#ifndef TRAIN_WORLD_H
#define TRAIN_WORLD_H

#include "train/launch.h"
#include "train/run.h"

// run_training (train/run.h) as the rank that `launch` says. What is wrong with one rank's inputs
// or device is told to all; so is a rank that has another recipe, other options or another build.
// With one rank it is run_training.
Status world_run_training(const Launch *launch, const Recipe *recipe,
                          const RunOptions *options) NODISCARD;

#endif
