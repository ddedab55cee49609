# The GPU backend: finds CUDA, cuBLASLt and cuDNN, builds cuda/*.cu, and says what it found.
#
# The kernels are compiled on any machine with nvcc, GPU or not. Without nvcc, or with
# D2M_CUDA=OFF, the programs have no GPU backend and say so when asked for one.
if(D2M_FUZZ OR D2M_SANITIZE OR D2M_CUDA STREQUAL "OFF")
  set(D2M_CUDA_FOUND OFF)
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(D2M_CUDA_FOUND ON)
  elseif(D2M_CUDA STREQUAL "ON")
    message(FATAL_ERROR "D2M_CUDA=ON, but nvcc was not found: put it on PATH or set CUDACXX")
  else()
    set(D2M_CUDA_FOUND OFF)
  endif()
endif()

if(D2M_CUDA_FOUND)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 87 89 90)
  endif()
  enable_language(CUDA CXX) # C++: cuDNN's frontend
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.6)
    message(FATAL_ERROR "CUDA ${CMAKE_CUDA_COMPILER_VERSION} found, 12.6 or newer is needed")
  endif()
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CXX_STANDARD 17)
  find_path(CUDNN_INCLUDE_DIR cudnn.h HINTS ${CUDAToolkit_INCLUDE_DIRS} ENV CUDNN_PATH
    PATH_SUFFIXES include)
  find_library(CUDNN_LIBRARY cudnn HINTS ${CUDAToolkit_LIBRARY_DIR} ENV CUDNN_PATH
    PATH_SUFFIXES lib lib64)
  set(cudnn_version "")
  if(CUDNN_INCLUDE_DIR AND EXISTS ${CUDNN_INCLUDE_DIR}/cudnn_version.h)
    file(STRINGS ${CUDNN_INCLUDE_DIR}/cudnn_version.h cudnn_version
      REGEX "^#define CUDNN_(MAJOR|MINOR|PATCHLEVEL) ")
    string(REGEX REPLACE "[^;]*(MAJOR|MINOR|PATCHLEVEL) +" "" cudnn_version "${cudnn_version}")
    string(REPLACE ";" "." cudnn_version "${cudnn_version}")
  endif()
  set(D2M_CUDNN_FRONTEND "" CACHE PATH "folder of cudnn_frontend.h")
  find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS} ENV NCCL_PATH
    PATH_SUFFIXES include)
  find_library(NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR} ENV NCCL_PATH
    PATH_SUFFIXES lib lib64)
  find_path(NVTX_INCLUDE_DIR nvtx3/nvToolsExt.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
  file(GLOB venv_include ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/include)
  find_path(CUDNN_FRONTEND_INCLUDE_DIR cudnn_frontend.h HINTS ${D2M_CUDNN_FRONTEND} ${venv_include}
    PATH_SUFFIXES include)

  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/cuda/*.cu
    ${CMAKE_SOURCE_DIR}/cuda/*.cpp)
  list(FILTER sources EXCLUDE REGEX "/hopper_[^/]*$")
  add_library(d2m_cuda_settings INTERFACE)
  target_include_directories(d2m_cuda_settings INTERFACE ${CMAKE_SOURCE_DIR})
  target_compile_definitions(d2m_cuda_settings INTERFACE _GNU_SOURCE)
  target_compile_options(d2m_cuda_settings INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers>"
    "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>"
    "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>")
  if(D2M_WERROR)
    target_compile_options(d2m_cuda_settings INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Werror>"
      "$<$<COMPILE_LANGUAGE:CXX>:-Werror>")
  endif()
  # cuda/hopper_*.cu need the target 90a, which code for newer chips cannot be made from.
  if(CMAKE_CUDA_ARCHITECTURES MATCHES "(^|;)90")
    file(GLOB hopper CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/cuda/hopper_*.cu)
    add_library(d2m_cuda_hopper OBJECT ${hopper})
    set_target_properties(d2m_cuda_hopper PROPERTIES CUDA_ARCHITECTURES 90a)
    set(d2m_have_hopper D2M_HAVE_HOPPER=1)
    target_compile_definitions(d2m_cuda_hopper PRIVATE ${d2m_have_hopper})
    target_link_libraries(d2m_cuda_hopper PRIVATE d2m_cuda_settings)
    list(APPEND sources $<TARGET_OBJECTS:d2m_cuda_hopper>)
  endif()
  add_library(d2m_cuda STATIC ${sources})
  target_link_libraries(d2m_cuda PRIVATE d2m_cuda_settings
    PUBLIC d2m_base CUDA::cudart CUDA::cublasLt)
  target_include_directories(d2m_cuda PUBLIC ${CMAKE_SOURCE_DIR})
  target_compile_definitions(d2m_cuda PUBLIC ${d2m_have_hopper})
  target_compile_definitions(d2m_settings INTERFACE D2M_HAVE_CUDA=1)
  if(cudnn_version AND cudnn_version VERSION_LESS 9)
    set(cudnn_found "${cudnn_version} is too old (9 is needed): attention uses the own kernels")
  elseif(CUDNN_INCLUDE_DIR AND CUDNN_LIBRARY AND CUDNN_FRONTEND_INCLUDE_DIR)
    target_compile_definitions(d2m_cuda PRIVATE D2M_HAVE_CUDNN=1)
    target_include_directories(d2m_cuda SYSTEM PRIVATE ${CUDNN_INCLUDE_DIR}
      ${CUDNN_FRONTEND_INCLUDE_DIR})
    target_link_libraries(d2m_cuda PUBLIC ${CUDNN_LIBRARY} CUDA::nvrtc) # nvrtc: the frontend
    set(cudnn_found "${cudnn_version} ${CUDNN_LIBRARY}, frontend ${CUDNN_FRONTEND_INCLUDE_DIR}")
  elseif(CUDNN_INCLUDE_DIR AND CUDNN_LIBRARY)
    set(cudnn_found "without its frontend's headers (pip install --no-deps nvidia-cudnn-frontend, \
then D2M_CUDNN_FRONTEND=<site-packages>/include): attention uses the own kernels")
  else()
    set(cudnn_found "not found: attention uses the own kernels")
  endif()
  if(NCCL_INCLUDE_DIR AND NCCL_LIBRARY)
    target_compile_definitions(d2m_cuda PRIVATE D2M_HAVE_NCCL=1)
    target_include_directories(d2m_cuda SYSTEM PRIVATE ${NCCL_INCLUDE_DIR})
    target_link_libraries(d2m_cuda PUBLIC ${NCCL_LIBRARY})
    set(nccl_found "${NCCL_LIBRARY}")
  else()
    set(nccl_found "not found: one GPU only")
  endif()
  if(NVTX_INCLUDE_DIR) # headers only; they load the tool, if one is attached
    target_compile_definitions(d2m_cuda PRIVATE D2M_HAVE_NVTX=1)
    target_include_directories(d2m_cuda SYSTEM PRIVATE ${NVTX_INCLUDE_DIR})
    target_link_libraries(d2m_cuda PUBLIC ${CMAKE_DL_LIBS})
    set(nvtx_found "${NVTX_INCLUDE_DIR}")
  else()
    set(nvtx_found "not found: time lines of Nsight Systems have no named ranges")
  endif()
  list(APPEND backends d2m_cuda)
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}, "
    "cuBLASLt ${CUDA_cublasLt_LIBRARY}; cuDNN ${cudnn_found}; NCCL ${nccl_found}; NVTX ${nvtx_found}")

  # GPU tests: tests/gpu/test_gpu_<family>.c, label `gpu`; without a device they exit 77 = skipped.
  if(D2M_TESTS)
    enable_testing()
    file(GLOB gpu_tests CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/gpu/*.c
      ${CMAKE_SOURCE_DIR}/tests/gpu/*.cu)
    list(REMOVE_ITEM gpu_tests ${CMAKE_SOURCE_DIR}/tests/gpu/test_gpu_ranks.c)
    foreach(source ${gpu_tests})
      get_filename_component(name ${source} NAME_WE)
      add_executable(${name} ${source})
      target_link_libraries(${name} PRIVATE d2m_cuda d2m_cpu d2m_settings)
      if(name MATCHES "^test_")
        add_test(NAME ${name} COMMAND ${name})
        set_tests_properties(${name} PROPERTIES LABELS gpu TIMEOUT 600 SKIP_RETURN_CODE 77
          RESOURCE_LOCK gpu)
      endif()
    endforeach()
    # Whole models and runs: two CPU suites built a second time, and runs on several GPUs. CUDA does
    # not survive a fork.
    foreach(source tests/test_parity.c tests/test_replay.c tests/gpu/test_gpu_ranks.c)
      get_filename_component(topic ${source} NAME_WE)
      string(REGEX REPLACE "^test_(gpu_)?" "test_gpu_" name ${topic})
      add_executable(${name} ${CMAKE_SOURCE_DIR}/${source})
      target_link_libraries(${name} PRIVATE d2m_train PkgConfig::CHECK ${HDF5_C_LIBRARIES})
      target_include_directories(${name} PRIVATE ${HDF5_C_INCLUDE_DIRS})
      target_compile_definitions(${name} PRIVATE TEST_ON_GPU TEST_SOURCE_DIR=".")
      add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
      set_tests_properties(${name} PROPERTIES LABELS gpu TIMEOUT 600 SKIP_RETURN_CODE 77
        RESOURCE_LOCK gpu ENVIRONMENT CK_FORK=no)
    endforeach()
  endif()
else()
  message(STATUS "CUDA: not used, the programs run on the CPU only")
endif()
