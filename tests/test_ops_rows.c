// Rows between token and expert order: copies and sums, bit for bit.
#include "tests/ops.h"

static const int thread_counts[] = {1, 2, 3};
enum { THREAD_COUNTS = 3 };

// 0, 1, ... count - 1, shuffled.
static int32_t *permutation(int64_t count) {
    int32_t *order = test_take(sizeof(int32_t) * (size_t)count);
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = test_random_int((int)i + 1);
        order[i] = order[at];
        order[at] = (int32_t)i;
    }
    return order;
}

// A permutation and a part of one, all rows of in or some of them.
static void check_gather(Backend *backend, int64_t rows, int64_t index_count, int words,
                         int divisor) {
    const int64_t in_rows = (index_count + divisor - 1) / divisor;
    Values in = values_random(in_rows * words, 1);
    const int32_t *index = permutation(index_count);
    float *out = floats_poisoned(rows * words + 1); // the last one stays
    GatherRowsArgs args = {.rows = rows,
                           .row_bytes = words * (int64_t)sizeof(float),
                           .divisor = divisor,
                           .index = index,
                           .in = in.f,
                           .out = out};
    RUN_OP(backend, OP_GATHER_ROWS, gather_rows, &args);
    for (int64_t r = 0; r < rows; r++)
        for (int w = 0; w < words; w++)
            ck_assert(out[r * words + w] == in.f[index[r] / divisor * words + w]);
    ck_assert(isnan(out[rows * words]));
}

START_TEST(gather_copies_rows) {
    const int divisors[] = {1, 3}, words[] = {1, 3, 5, 8, 65};
    const int64_t rows[] = {0, 1, 2, 7, 300};
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        for (int d = 0; d < 2; d++) {
            for (int w = 0; w < 5; w++) {
                for (int r = 0; r < 5; r++) {
                    check_gather(backend, rows[r], rows[r] * divisors[d], words[w], divisors[d]);
                    check_gather(backend, rows[r], rows[r] * 2 + 5, words[w], divisors[d]);
                }
            }
        }
    }
}
END_TEST

// Bytes, not numbers: any bits survive.
START_TEST(gather_keeps_all_bits) {
    const uint32_t in[3] = {0x7FA00001u, 0xFFFFFFFFu, 0x80000000u}; // NaNs, and -0
    const int32_t index[3] = {2, 0, 1};
    uint32_t out[3] = {0};
    GatherRowsArgs args = {3, sizeof in[0], 1, index, in, out};
    RUN_OP(test_backend(2), OP_GATHER_ROWS, gather_rows, &args);
    for (int i = 0; i < 3; i++) ck_assert_uint_eq(out[i], in[index[i]]);
}
END_TEST

static void check_combine(Backend *backend, int64_t tokens, int hidden, int k) {
    Values rows = values_random(tokens * k * hidden, 1);
    const int32_t *row_of_slot = permutation(tokens * k);
    float *out = floats_poisoned(tokens * hidden + 1);
    CombineRowsArgs args = {.tokens = tokens,
                            .hidden_size = hidden,
                            .top_k = k,
                            .row_of_slot = row_of_slot,
                            .rows = rows.f,
                            .out = out};
    RUN_OP(backend, OP_COMBINE_ROWS, combine_rows, &args);
    for (int64_t t = 0; t < tokens; t++) {
        for (int h = 0; h < hidden; h++) {
            float sum = 0.0f;
            for (int j = 0; j < k; j++) sum += rows.f[row_of_slot[t * k + j] * hidden + h];
            ck_assert(out[t * hidden + h] == sum);
        }
    }
    ck_assert(isnan(out[tokens * hidden]));
}

START_TEST(combine_sums_in_order) {
    const int64_t tokens[] = {0, 1, 6, 250};
    const int hidden[] = {1, 3, 37};
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        for (int t = 0; t < 4; t++) {
            for (int h = 0; h < 3; h++) {
                check_combine(backend, tokens[t], hidden[h], 1);
                check_combine(backend, tokens[t], hidden[h], 3);
            }
        }
    }
}
END_TEST

// To expert order and back: k times every token.
START_TEST(there_and_back) {
    enum { TOKENS = 90, HIDDEN = 5, K = 3 };
    Backend *backend = test_backend(2);
    Values x = values_random(TOKENS * HIDDEN, 1);
    float *rows = floats_poisoned(TOKENS * K * HIDDEN), *back = floats_poisoned(TOKENS * HIDDEN);
    const int32_t *slot_of_row = permutation(TOKENS * K);
    int32_t row_of_slot[TOKENS * K];
    for (int32_t row = 0; row < TOKENS * K; row++) row_of_slot[slot_of_row[row]] = row;
    GatherRowsArgs gather = {TOKENS * K, HIDDEN * sizeof(float), K, slot_of_row, x.f, rows};
    CombineRowsArgs combine = {TOKENS, HIDDEN, K, row_of_slot, rows, back};
    RUN_OP(backend, OP_GATHER_ROWS, gather_rows, &gather);
    RUN_OP(backend, OP_COMBINE_ROWS, combine_rows, &combine);
    for (int i = 0; i < TOKENS * HIDDEN; i++) ck_assert(back[i] == x.f[i] + x.f[i] + x.f[i]);
}
END_TEST

TEST_MAIN("rows between orders", TEST(gather_copies_rows), TEST(gather_keeps_all_bits),
          TEST(combine_sums_in_order), TEST(there_and_back))
