# Cross-compiles for aarch64 with Debian's and Ubuntu's g++-aarch64-linux-gnu. Run the programs by
# qemu-aarch64 -L /usr/aarch64-linux-gnu PROGRAM (from qemu-user).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
