# Whether the backends that were asked for can be built. If not, the build ends with a sentence that says what was found,
# what is needed and what to do, before anything is compiled: never with a page of compiler errors, and never with a
# build for the CPU.

include(CheckCXXSourceCompiles)

# End the build: `option` needs `needed`, and here is `found`.
function(minerva_cannot_build option needed found remedy)
  message(FATAL_ERROR "${option}=ON needs ${needed}; found: ${found}. ${remedy}, or leave ${option} out.")
endfunction()

# Set `result` to `text`, or to `otherwise` if a path was not found.
function(minerva_found result path otherwise)
  if(path)
    set(${result} "${path}" PARENT_SCOPE)
  else()
    set(${result} "${otherwise}" PARENT_SCOPE)
  endif()
endfunction()

if(GGML_CUDA)
  find_package(CUDAToolkit QUIET)
  if(NOT CUDAToolkit_FOUND OR NOT CUDAToolkit_NVCC_EXECUTABLE)
    minerva_cannot_build(GGML_CUDA "the CUDA toolkit with nvcc" "no nvcc on the PATH or in CUDAToolkit_ROOT"
      "Install it (https://developer.nvidia.com/cuda-downloads) and name its folder with -DCUDAToolkit_ROOT=")
  endif()
  if(NOT TARGET CUDA::cublas)
    # The package nvidia-cublas has it, too. Python does not find that: pip hides it from the build.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('platlib'))"
      OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
    file(GLOB cublas "${site_packages}/nvidia/*/lib/libcublas.so.*")
    if(NOT cublas)
      minerva_cannot_build(GGML_CUDA "cuBLAS" "nvcc ${CUDAToolkit_VERSION} in ${CUDAToolkit_BIN_DIR}, no cuBLAS"
        "Install the rest of the toolkit (libcublas-dev), or pip install nvidia-cublas")
    endif()
    get_filename_component(cublas_folder "${cublas}" DIRECTORY)
    file(GLOB cublas_lt "${cublas_folder}/libcublasLt.so.*")
    message(STATUS "cuBLAS of the package nvidia-cublas: ${cublas}")
    set(CUDA_cublas_LIBRARY "${cublas}" CACHE FILEPATH "" FORCE)
    set(CUDA_cublasLt_LIBRARY "${cublas_lt}" CACHE FILEPATH "" FORCE)
    include_directories(SYSTEM "${cublas_folder}/../include")
    string(REPLACE "${site_packages}" "$ORIGIN/../.." minerva_rpath "${cublas_folder}")
  endif()
  if(NOT TARGET CUDA::cuda_driver AND NOT GGML_CUDA_NO_VMM)
    message(STATUS "The driver's library is not here to link to: GGML_CUDA_NO_VMM=ON")
    set(GGML_CUDA_NO_VMM ON)
  endif()
endif()

if(GGML_HIP)
  find_package(hip QUIET HINTS /opt/rocm "$ENV{ROCM_PATH}")
  if(NOT hip_FOUND)
    minerva_cannot_build(GGML_HIP "ROCm 6.1 or newer" "no HIP in CMAKE_PREFIX_PATH, ROCM_PATH or /opt/rocm"
      "Install ROCm and name its folder with -DCMAKE_PREFIX_PATH=")
  endif()
endif()

if(GGML_VULKAN)
  find_package(Vulkan QUIET COMPONENTS glslc)
  find_package(SPIRV-Headers CONFIG QUIET HINTS "$ENV{VULKAN_SDK}")
  set(remedy "Install a Vulkan SDK of 1.3.272 or newer (https://vulkan.lunarg.com) and set VULKAN_SDK")
  set(needed "Vulkan headers of 1.3.272 or newer, SPIRV-Headers, the loader and glslc")
  if(NOT Vulkan_INCLUDE_DIR OR NOT Vulkan_LIBRARY OR NOT Vulkan_GLSLC_EXECUTABLE OR NOT SPIRV-Headers_FOUND)
    minerva_found(headers "${Vulkan_INCLUDE_DIR}" "no headers")
    minerva_found(loader "${Vulkan_LIBRARY}" "no loader")
    minerva_found(glslc "${Vulkan_GLSLC_EXECUTABLE}" "no glslc")
    minerva_found(spirv "${SPIRV-Headers_DIR}" "no SPIRV-Headers")
    minerva_cannot_build(GGML_VULKAN "${needed}" "${headers}, ${loader}, ${glslc}, ${spirv}" "${remedy}")
  endif()
  set(CMAKE_REQUIRED_INCLUDES "${Vulkan_INCLUDE_DIR}")
  set(CMAKE_REQUIRED_FLAGS "-std=c++17")
  check_cxx_source_compiles("#include <vulkan/vulkan.hpp>\nint main() { return sizeof(vk::LayerSettingEXT) == 0; }"
    MINERVA_VULKAN_IS_NEW)
  unset(CMAKE_REQUIRED_INCLUDES)
  unset(CMAKE_REQUIRED_FLAGS)
  if(NOT MINERVA_VULKAN_IS_NEW)
    unset(MINERVA_VULKAN_IS_NEW CACHE)  # look again once it was mended
    minerva_cannot_build(GGML_VULKAN "${needed}" "headers of ${Vulkan_VERSION} in ${Vulkan_INCLUDE_DIR}" "${remedy}")
  endif()
endif()

if(GGML_SYCL)
  set(CMAKE_REQUIRED_FLAGS "-fsycl")
  check_cxx_source_compiles("#include <sycl/sycl.hpp>\nint main() { sycl::queue queue; }" MINERVA_HAS_SYCL)
  unset(CMAKE_REQUIRED_FLAGS)
  if(NOT MINERVA_HAS_SYCL)
    unset(MINERVA_HAS_SYCL CACHE)
    minerva_cannot_build(GGML_SYCL "a compiler with SYCL" "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
      "Install oneAPI, source its setvars.sh and set CC=icx CXX=icpx")
  endif()
endif()

if(GGML_BLAS AND NOT APPLE)
  set(BLA_VENDOR "${GGML_BLAS_VENDOR}")
  if(NOT BLA_VENDOR)
    set(BLA_VENDOR "Generic")
  endif()
  find_package(BLAS QUIET)
  if(NOT BLAS_FOUND)
    minerva_cannot_build(GGML_BLAS "a BLAS library with its headers" "none of the vendor ${BLA_VENDOR}"
      "Install one (libopenblas-dev) and name it with -DGGML_BLAS_VENDOR=OpenBLAS")
  endif()
endif()

if(GGML_OPENCL)
  find_package(OpenCL QUIET)
  if(NOT OpenCL_FOUND)
    minerva_cannot_build(GGML_OPENCL "OpenCL's headers and loader" "none"
      "Install them (opencl-headers, ocl-icd-opencl-dev)")
  endif()
endif()

if(GGML_METAL AND NOT APPLE)
  minerva_cannot_build(GGML_METAL "macOS" "${CMAKE_SYSTEM_NAME}" "Metal is Apple's")
endif()
