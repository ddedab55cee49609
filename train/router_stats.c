// Shares, means and losses from the routers' sums; doubles throughout, as the sums are.
#include "train/router_stats.h"

#include <string.h>

void router_layer_stats(const ModelConfig *config, const ModelSums *sums, int layer,
                        LayerStats *out) {
    memset(out, 0, sizeof *out);
    int n = out->num_experts = config->layers[layer].num_experts;
    const double *assignments = sums->assignments + (int64_t)layer * sums->stride; // (N)
    const double *probability = sums->probability + (int64_t)layer * sums->stride; // (N)
    double total = 0;
    for (int i = 0; i < n; i++) total += assignments[i];
    for (int i = 0; i < n; i++) {
        out->dead += assignments[i] == 0;
        if (total == 0 || sums->tokens == 0) continue;
        double share = assignments[i] / total;
        out->load[i] = share;
        if (share > out->max_load) out->max_load = share;
        out->balance += n * share * (probability[i] / sums->tokens);
    }
    if (n == 0 || sums->tokens == 0) return;
    out->max_over_mean = n * out->max_load;
    out->entropy = sums->entropy[layer] / sums->tokens;
    out->z = sums->z[layer] / sums->tokens;
}

int router_moe_layers(const ModelConfig *config) {
    int count = 0;
    for (int layer = 0; layer < config->num_layers; layer++)
        count += config->layers[layer].num_experts > 0;
    return count;
}

double router_balance(const ModelConfig *config, const ModelSums *sums) {
    double total = 0;
    LayerStats stats;
    for (int layer = 0; layer < config->num_layers; layer++) {
        router_layer_stats(config, sums, layer, &stats);
        total += stats.balance;
    }
    return total;
}

double router_z(const ModelConfig *config, const ModelSums *sums) {
    double total = 0;
    LayerStats stats;
    for (int layer = 0; layer < config->num_layers; layer++) {
        router_layer_stats(config, sums, layer, &stats);
        total += stats.z;
    }
    return total;
}
