// Writes a model's logits at chosen places of token sequences: logits MODEL TOKENS OUT THREADS
//
// TOKENS holds int32 numbers: for each sequence its length, the place of the first token that is
// asked for, and its tokens. OUT gets a row of float32 for each token from that place on: what the
// model made of the tokens before it.
#include "llama.h"
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

static void silent(ggml_log_level, const char *, void *) {}

int main(int argc, char ** argv) {
    if (argc != 5) return 2;
    llama_log_set(silent, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = 1024;
    params.n_threads = params.n_threads_batch = std::atoi(argv[4]);
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    FILE * in = std::fopen(argv[2], "rb"), * out = std::fopen(argv[3], "wb");
    if (!context || !in || !out) return 1;
    const size_t vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    int32_t head[2];
    while (std::fread(head, 4, 2, in) == 2) {
        std::vector<int32_t> tokens(head[0]);
        if (std::fread(tokens.data(), 4, tokens.size(), in) != tokens.size()) return 1;
        llama_batch batch = llama_batch_init(head[0], 0, 1);
        batch.n_tokens = head[0] - 1;
        for (int32_t i = 0; i < batch.n_tokens; i++) {
            batch.token[i] = tokens[i]; batch.pos[i] = i; batch.n_seq_id[i] = 1; batch.seq_id[i][0] = 0;
            batch.logits[i] = i >= head[1] - 1;
        }
        llama_memory_clear(llama_get_memory(context), true);
        if (llama_decode(context, batch)) return 1;
        for (int32_t i = head[1] - 1; i < batch.n_tokens; i++)
            if (std::fwrite(llama_get_logits_ith(context, i), 4, vocab, out) != vocab) return 1;
        llama_batch_free(batch);
    }
    std::fclose(out);
    return 0;
}
