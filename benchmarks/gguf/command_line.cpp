// What llama.cpp's export-lora and quantize take from its common library: their command lines.
//
// The library itself holds the parsers of every chat format, and takes longer to compile than all
// the rest. What the two programs do to tensors is in their own files, which stay as they are.
#include "arg.h"
#include "common.h"
#include "imatrix-loader.h"

#include <string>

void common_init() {}

bool common_params_parse(
    int argc, char ** argv, common_params & params, llama_example, void (*)(int, char **)) {
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string key = argv[i], value = argv[i + 1];
        if (key == "-m") {
            params.model.path = value;
        } else if (key == "-o") {
            params.out_file = value;
        } else if (key == "-t") {
            params.cpuparams.n_threads = std::stoi(value);
        } else if (key == "--lora") {
            common_adapter_lora_info info;
            info.path = value;
            info.scale = 1.0f;
            params.lora_adapters.push_back(info);
        } else {
            return false;
        }
    }
    return true;
}

bool common_imatrix_load(const std::string &, common_imatrix &) { return false; }

bool string_parse_kv_override(const char *, std::vector<llama_model_kv_override> &) {
    return false;
}

void llama_print_build_info(const char *, FILE *) {}
