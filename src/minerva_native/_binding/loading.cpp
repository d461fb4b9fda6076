// Backends: those that are files beside the module, and what the binding calls of the CPU's, which may be one of them.
#include "backend.h"
#include "failure.h"
#include "ggml_workers.h"

#include <cstring>
#include <memory>
#include <string>

#include <dlfcn.h>

namespace {

void on_log(enum ggml_log_level level, const char * text, void * /* data */) {
    ggml_log_callback callback = nullptr;
    void * data = nullptr;
    ggml_log_get(&callback, &data);
    callback(level, text, data);
}

const minerva_host host = {
    minerva::on_abort, on_log, ggml_backend_cpu_buffer_type, minerva_start_worker, minerva_while_waiting,
};

struct Close {
    void operator()(void * library) const { dlclose(library); }
};
using Library = std::unique_ptr<void, Close>;

// Throws what the system says if a file, or a library that it needs, cannot be loaded.
Library opened(const char * path) {
    Library library(dlopen(path, RTLD_NOW | RTLD_LOCAL));
    if (library == nullptr) {
        throw std::runtime_error(dlerror());
    }
    return library;
}

template <class Function> Function found(void * library, const char * name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

// How well a library's variant suits this CPU; 0 if it needs instructions that are not there.
int32_t score_of(void * library) {
    const auto suits = found<minerva_backend_suits_t>(library, "minerva_backend_suits");
    const auto score = found<ggml_backend_score_t>(library, "ggml_backend_score");
    if (suits != nullptr && !suits()) {
        return 0;
    }
    return score != nullptr ? score() : 1;
}

#if defined(GGML_BACKEND_DL)
minerva_backend_has_dot_t has_dot = [](enum ggml_type) { return false; };
#else
minerva_backend_has_dot_t has_dot = [](enum ggml_type type) {
    return ggml_get_type_traits_cpu(type)->vec_dot != nullptr;
};
#endif

template <class Function> Function of_cpu(const char * name) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    void * function = cpu == nullptr ? nullptr
                                     : ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), name);
    if (function == nullptr) {
        throw std::runtime_error(std::string("no backend for the CPU has ") + name);
    }
    return reinterpret_cast<Function>(function);
}

}  // namespace

const minerva::Cpu & minerva::cpu() {
    static const Cpu functions = {
        of_cpu<decltype(Cpu::threadpool_new)>("ggml_threadpool_new"),
        of_cpu<decltype(Cpu::threadpool_free)>("ggml_threadpool_free"),
        of_cpu<decltype(Cpu::set_threadpool)>("ggml_backend_cpu_set_threadpool"),
    };
    return functions;
}

int32_t minerva_backend_score(const char * path) {
    return minerva::guarded<int32_t>(MINERVA_THREW, [&] {
        return score_of(opened(path).get());
    });
}

ggml_backend_reg_t minerva_backend_load(const char * path) {
    return minerva::guarded<ggml_backend_reg_t>(nullptr, [&] {
        Library handle = opened(path);
        void * library = handle.get();
        const auto source = found<minerva_backend_source_t>(library, "minerva_backend_source");
        const auto init = found<minerva_backend_init_t>(library, "minerva_backend_init");
        if (source == nullptr || init == nullptr) {
            throw std::runtime_error("it is not a backend of this package");
        }
        if (std::strcmp(source(), ggml_commit()) != 0) {
            throw std::runtime_error(std::string("it was built from llama.cpp ") + source() + ", and this module from " +
                                     ggml_commit());
        }
        if (score_of(library) == 0) {
            throw std::runtime_error("it needs instructions that this CPU does not have");
        }
        ggml_backend_reg_t backend = init(&host);
        handle.release();  // it may have begun threads: it stays
        if (backend == nullptr) {
            throw std::runtime_error("it found nothing that it can compute on");
        }
        if (backend->api_version != GGML_BACKEND_API_VERSION) {
            throw std::runtime_error("its interface is version " + std::to_string(backend->api_version) +
                                     " of ggml's, and this module's is " + std::to_string(GGML_BACKEND_API_VERSION));
        }
        if (const auto of_file = found<minerva_backend_has_dot_t>(library, "minerva_backend_has_dot")) {
            has_dot = of_file;
        }
        ggml_backend_register(backend);
        return backend;
    });
}

bool minerva_has_dot(enum ggml_type type) {
    return has_dot(type);
}
