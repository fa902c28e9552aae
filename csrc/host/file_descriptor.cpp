#include "file_descriptor.h"

#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace longctx::host {

void FileDescriptor::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

int FileDescriptor::read_at(void* data, size_t bytes, int64_t offset, size_t* done) const {
  *done = 0;
  while (*done < bytes) {
    const ssize_t got = ::pread(fd_, static_cast<char*>(data) + *done, bytes - *done,
                                offset + static_cast<int64_t>(*done));
    if (got == 0) return 0;
    if (got > 0) {
      *done += static_cast<size_t>(got);
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

int FileDescriptor::write_at(const void* data, size_t bytes, int64_t offset) const {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t put = ::pwrite(fd_, static_cast<const char*>(data) + done, bytes - done,
                                 offset + static_cast<int64_t>(done));
    if (put > 0) {
      done += static_cast<size_t>(put);
    } else if (put == 0) {
      return ENOSPC;
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

std::string errno_text(int error) { return std::generic_category().message(error); }

}  // namespace longctx::host
