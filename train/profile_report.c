// What a profile says: the table on the console and the same numbers as JSON.
#include "train/profile.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>
#include "train/console.h"

// --- Limits --------------------------------------------------------------------------------------

// Vendors' figures: dense bf16 products with fp32 accumulation, without sparsity, and memory
// bandwidth. `part` is looked for in the device's name; the first match counts, so that the
// narrower name comes first.
typedef struct NamedPeak {
    const char *part;
    double tflops, gb_per_second;
} NamedPeak;
static const NamedPeak named_peaks[] = {
    {"GH200 144G", 989, 4900}, {"GH200", 989, 4000},
    {"H200 NVL", 835, 4800},   {"H200", 989, 4800},
    {"H100 PCIe", 756, 2039},  {"H100 NVL", 835, 3938},
    {"H100", 989, 3350},       {"A100-SXM4-80GB", 312, 2039},
    {"A100 80GB", 312, 1935},  {"A100", 312, 1555},
    {"L40S", 362, 864},        {"RTX 4090", 165, 1008},
    {"RTX 3090", 71, 936},
};

DevicePeak device_peak(const char *device_name, DType compute_dtype) {
    for (size_t i = 0; i < sizeof named_peaks / sizeof named_peaks[0]; i++) {
        const NamedPeak *named = &named_peaks[i];
        if (!strstr(device_name, named->part)) continue;
        return (DevicePeak){compute_dtype == DTYPE_BF16 ? named->tflops * 1e12 : 0,
                            named->gb_per_second * 1e9};
    }
    return (DevicePeak){0, 0};
}

ProfileRate profile_rate(const ProfileRow *row, const DevicePeak *peak) {
    double seconds = row->ms * 1e-3;
    bool known = peak->flops > 0 && peak->bytes_per_second > 0;
    bool flops = known ? row->work.flops / peak->flops > row->work.bytes / peak->bytes_per_second
                       : row->product;
    ProfileRate rate = {.flops = flops, .share = NAN};
    rate.value = (flops ? row->work.flops : row->work.bytes) / seconds;
    double limit = flops ? peak->flops : peak->bytes_per_second;
    if (limit > 0 && !row->host && !row->ranks) rate.share = rate.value / limit;
    return rate;
}

typedef struct Totals {
    double step_ms, outside_ms; // per step
    double ranks_ms;            // of a step: communication that no computation hides
    double tokens_per_second;
    double flops; // a second, of the model
    double mfu;   // NaN = not known
} Totals;

static Totals totals_of(const Profile *profile, const ProfileRun *run) {
    const ProfileRow *const *rows;
    int count = profile_rows(profile, &rows);
    double inside = 0, steps = (double)run->steps;
    Totals t = {.step_ms = profile_total_ms(profile) / steps, .mfu = NAN};
    for (int i = 0; i < count; i++) {
        inside += rows[i]->ms;
        if (rows[i]->ranks) t.ranks_ms += rows[i]->ms / steps;
    }
    t.outside_ms = t.step_ms - inside / steps;
    t.tokens_per_second = run->tokens_per_step / (t.step_ms * 1e-3);
    t.flops = t.tokens_per_second * run->flops_per_token;
    if (run->peak.flops > 0) t.mfu = t.flops / run->peak.flops;
    return t;
}

// --- The table -----------------------------------------------------------------------------------

enum { FIGURE_MAX = 32 };

static const char *share_text(double share, char text[FIGURE_MAX]) {
    if (!isfinite(share)) return "n/a";
    snprintf(text, FIGURE_MAX, "%.1f %%", 100 * share);
    return text;
}

// "559 TFLOP/s", "12.3 GFLOP/s", "3,350 GB/s": three digits.
static const char *speed_text(const ProfileRate *rate, char text[FIGURE_MAX]) {
    double giga = rate->value * 1e-9;
    bool tera = rate->flops && giga >= 999.5;
    double value = tera ? giga * 1e-3 : giga;
    int decimals = value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    if (!isfinite(value)) return "n/a";
    snprintf(text, FIGURE_MAX, "%.*f %s", decimals, value,
             rate->flops ? (tera ? "TFLOP/s" : "GFLOP/s") : "GB/s");
    return text;
}

static void print_row(const ProfileRow *row, const ProfileRun *run, double step_ms, FILE *out) {
    char speed[FIGURE_MAX], share[FIGURE_MAX], limit[FIGURE_MAX];
    double steps = (double)run->steps, ms = row->ms / steps;
    ProfileRate rate = profile_rate(row, &run->peak);
    fprintf(out, "%-22s %7.6g %11.3f %8s %15s %9s\n", row->name, (double)row->calls / steps, ms,
            share_text(ms / step_ms, share), speed_text(&rate, speed),
            share_text(rate.share, limit));
}

void profile_print(const Profile *profile, const ProfileRun *run, FILE *out) {
    const ProfileRow *const *rows;
    int count = profile_rows(profile, &rows);
    Totals t = totals_of(profile, run);
    char share[FIGURE_MAX], speed[FIGURE_MAX], rate[DURATION_TEXT_SIZE], mfu[FIGURE_MAX];
    fprintf(out, "%-22s %7s %11s %8s %15s %9s\n", "op", "calls", "ms a step", "share", "rate",
            "of limit");
    for (int i = 0; i < count; i++) print_row(rows[i], run, t.step_ms, out);
    fprintf(out, "%-22s %7s %11.3f %8s\n", "outside ops", "", t.outside_ms,
            share_text(t.outside_ms / t.step_ms, share));
    ProfileRate model = {.value = t.flops, .flops = true};
    fprintf(out, "%-22s %7s %11.3f %8s %15s %9s  %s tok/s, MFU %s\n", "step", "", t.step_ms,
            "100.0 %", speed_text(&model, speed), share_text(t.mfu, share),
            rate_text(t.tokens_per_second, rate), share_text(t.mfu, mfu));
}

// --- JSON ----------------------------------------------------------------------------------------

static json_t *number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *known(double value) {
    return value > 0 ? json_real(value) : json_null();
}

static json_t *row_to_json(const ProfileRow *row, const ProfileRun *run, double step_ms) {
    double steps = (double)run->steps, ms = row->ms / steps;
    ProfileRate rate = profile_rate(row, &run->peak);
    return json_pack("{s:s, s:f, s:o, s:o, s:f, s:f, s:o, s:s, s:o}", "op", row->name, "calls",
                     (double)row->calls / steps, "ms", number(ms), "share", number(ms / step_ms),
                     "flops", row->work.flops / steps, "bytes", row->work.bytes / steps, "rate",
                     number(rate.value), "unit", rate.flops ? "FLOP/s" : "byte/s", "share_of_limit",
                     number(rate.share));
}

json_t *profile_to_json(const Profile *profile, const ProfileRun *run) {
    const ProfileRow *const *rows;
    int count = profile_rows(profile, &rows);
    Totals t = totals_of(profile, run);
    json_t *ops = json_array();
    for (int i = 0; i < count; i++) {
        if (json_array_append_new(ops, row_to_json(rows[i], run, t.step_ms)) == 0) continue;
        json_decref(ops);
        return NULL;
    }
    // The o format takes the reference, and fails as a whole when one of them is NULL.
    return json_pack("{s:I, s:I, s:f, s:f, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "steps",
                     (json_int_t)run->steps, "warmup_steps", (json_int_t)run->warmup_steps,
                     "tokens_per_step", run->tokens_per_step, "flops_per_token",
                     run->flops_per_token, "step_ms", number(t.step_ms), "outside_ops_ms",
                     number(t.outside_ms), "exposed_communication_ms", number(t.ranks_ms),
                     "tokens_per_second", number(t.tokens_per_second), "mfu", number(t.mfu),
                     "peak_flops", known(run->peak.flops), "peak_bytes_per_second",
                     known(run->peak.bytes_per_second), "ops", ops);
}
