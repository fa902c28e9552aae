set(LONGCTX_LANES_SOURCES main.cu matrix_cases.cu thread_cases.cu)
list(TRANSFORM LONGCTX_LANES_SOURCES PREPEND ${CMAKE_SOURCE_DIR}/tests/lanes/)
