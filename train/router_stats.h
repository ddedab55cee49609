// What the sums of the routers say: how experts are loaded, and the value of the router losses.
//
// LB = Σ over MoE layers of N·Σ_i f_i·P_i (METHOD.md §5): f_i is expert i's share of the
// layer's assignments, P_i its mean probability. A balanced layer gives 1, so a balanced model
// gives its number of MoE layers; other programs average over layers or multiply by top_k.
#ifndef TRAIN_ROUTER_STATS_H
#define TRAIN_ROUTER_STATS_H

#include <stdint.h>
#include "model/config.h"
#include "model/model.h"

typedef struct LayerStats {
    int num_experts;                // 0 for a dense layer; everything else is 0 then, too
    double load[MODEL_MAX_EXPERTS]; // f_i, share of assignments; sums to 1
    double max_load;                // largest f_i
    double max_over_mean;           // N · max f_i; 1 when balanced
    double entropy;                 // mean over tokens of the router's entropy, in nats
    int dead;                       // experts without any assignment
    double balance;                 // N·Σ f_i·P_i
    double z;                       // mean over tokens of logsumexp²
} LayerStats;

// Zeros (and every expert dead) when no token was seen.
void router_layer_stats(const ModelConfig *config, const ModelSums *sums, int layer,
                        LayerStats *out);
int router_moe_layers(const ModelConfig *config);
double router_balance(const ModelConfig *config, const ModelSums *sums); // Σ over layers
double router_z(const ModelConfig *config, const ModelSums *sums);       // Σ over layers

#endif
