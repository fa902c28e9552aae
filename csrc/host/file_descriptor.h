// An open file: closed with its owner; reads and writes that are whole or say why not.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace longctx::host {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() { close(); }
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    if (this != &other) {
      close();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }

  bool is_open() const { return fd_ >= 0; }
  int get() const { return fd_; }
  void close();
  // Both return 0 or an errno. A read that meets the end of the file returns 0 and fewer bytes in
  // `done`.
  int read_at(void* data, size_t bytes, int64_t offset, size_t* done) const;
  int write_at(const void* data, size_t bytes, int64_t offset) const;

 private:
  int fd_ = -1;
};

std::string errno_text(int error);

}  // namespace longctx::host
