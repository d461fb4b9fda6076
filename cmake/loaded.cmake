# GGML_BACKEND_DL=ON: backends are files beside the module, loaded when it starts (see compute.py), and not part of it.
# A machine without a GPU's libraries then computes on its CPU, and of several CPU backends the best is taken.
#
# Upstream would make llama, ggml and ggml-base shared libraries for that, whose symbols clash with those of another
# llama.cpp in the process. Here they stay in the module, static and hidden, and each backend has a hidden copy of what
# it uses of ggml-base. What may exist only once is handed over when a backend is loaded: see backend.h.

if(MINERVA_BUILD_TOOLS)
  message(FATAL_ERROR "GGML_BACKEND_DL=ON and MINERVA_BUILD_TOOLS=ON exclude each other: upstream's tools cannot load "
    "backends that were made for the binding.")
endif()

# Upstream looks at BUILD_SHARED_LIBS before its first library, and insists; every library is static all the same.
# RPC has no library of its own to miss, and its transport is in the module.
set(BUILD_SHARED_LIBS ON)
macro(add_library name)
  set(minerva_arguments ${ARGN})
  if("${name}" MATCHES "^(ggml|llama)")
    set(BUILD_SHARED_LIBS OFF)  # in the folder of the call
  endif()
  if("${name}" STREQUAL "ggml-rpc")
    list(REMOVE_ITEM minerva_arguments MODULE)
  endif()
  _add_library(${name} ${minerva_arguments})
endmacro()

# Upstream has its library depend on every backend, and so would build variants that the compiler cannot make. The module
# depends on those that are installed with it.
macro(add_dependencies name)
  if(NOT "${name}" STREQUAL "ggml")
    _add_dependencies(${name} ${ARGN})
  endif()
endmacro()

include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)

# Set `result` to whether the compiler knows the instructions of a variant of the CPU's backend.
function(minerva_compiler_knows backend result)
  get_target_property(options ${backend} COMPILE_OPTIONS)
  list(FILTER options INCLUDE REGEX "^-m")
  list(JOIN options " " CMAKE_REQUIRED_FLAGS)
  string(MAKE_C_IDENTIFIER "MINERVA_HAS_${backend}" known)
  check_cxx_source_compiles("int main() { return 0; }" ${known})
  if(NOT ${known})
    message(STATUS "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} does not know ${CMAKE_REQUIRED_FLAGS}: "
      "${backend} is left out")
  endif()
  set(${result} "${${known}}" PARENT_SCOPE)
endfunction()

check_cxx_compiler_flag(-mavx512fp16 MINERVA_HAS_AVX512FP16)

# Make what upstream has as modules into this package's backends, and name them in `minerva_backends`.
macro(minerva_finish_backends)
  if(GGML_RPC)
    target_compile_definitions(ggml PUBLIC GGML_USE_RPC)
    target_link_libraries(ggml PUBLIC ggml-rpc)
  endif()
  set(minerva_backends "")
  foreach(backend IN LISTS GGML_AVAILABLE_BACKENDS)  # in the cache: some may be an earlier configuration's
    set(known TRUE)
    if(TARGET ${backend} AND backend MATCHES "^ggml-cpu-")
      minerva_compiler_knows(${backend} known)
    endif()
    if(TARGET ${backend} AND known AND NOT backend STREQUAL "ggml-rpc")
      list(APPEND minerva_backends ${backend})
      target_sources(${backend} PRIVATE "${binding_dir}/backend.cpp")
      target_include_directories(${backend} PRIVATE "${binding_dir}" "${llama_dir}/ggml/src")
      # libllama compares its address.
      target_compile_definitions(${backend} PRIVATE ggml_backend_cpu_buffer_type=minerva_cpu_buffer_type)
      set(exported minerva_backend_source minerva_backend_init)
      if(backend MATCHES "^ggml-cpu")
        target_compile_definitions(${backend} PRIVATE MINERVA_CPU)
        list(APPEND exported minerva_backend_has_dot minerva_backend_suits)
      endif()
      if(backend STREQUAL "ggml-cpu-sapphirerapids" AND MINERVA_HAS_AVX512FP16)
        # Upstream's variant for CPUs with AMX goes without, and takes a twentieth longer for prompts.
        target_compile_options(${backend} PRIVATE -mavx512fp16)
      endif()
      if(TARGET ${backend}-feats)
        list(APPEND exported ggml_backend_score)
      endif()
      minerva_export(${backend} ${exported})
      if(backend STREQUAL "ggml-cuda")
        # Those of Python packages for CUDA 13, then for CUDA 12.
        set_target_properties(${backend} PROPERTIES INSTALL_RPATH
          "$ORIGIN/../../nvidia/cu13/lib;$ORIGIN/../../nvidia/cuda_runtime/lib;$ORIGIN/../../nvidia/cublas/lib")
      endif()
    endif()
  endforeach()
endmacro()
