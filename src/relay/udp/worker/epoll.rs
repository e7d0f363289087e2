//! An epoll instance that the thread's runtime can wait for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Many descriptors, of which the runtime knows one.
pub(super) struct WaitableEpoll(AsyncFd<Descriptor>);

struct Descriptor(Arc<Epoll>);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl WaitableEpoll {
    /// An empty one, within a runtime.
    pub(super) fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // SAFETY: the AsyncFd owns the epoll descriptor, whose number therefore stays the same and open for
        // as long as it is registered
        #[expect(
            unsafe_code,
            reason = "tokio cannot know that the number stays the same"
        )]
        let registered = unsafe {
            AsyncFd::register_with_interest(Descriptor(Arc::new(epoll)), Interest::READABLE)
        };
        Ok(Self(registered.map_err(io::Error::from)?))
    }

    /// For other threads.
    pub(super) fn shared(&self) -> Arc<Epoll> {
        Arc::clone(&self.0.get_ref().0)
    }

    pub(super) fn add(&self, descriptor: impl AsFd, event: EpollEvent) -> io::Result<()> {
        Ok(self.0.get_ref().0.add(descriptor, event)?)
    }

    pub(super) fn delete(&self, descriptor: impl AsFd) -> io::Result<()> {
        Ok(self.0.get_ref().0.delete(descriptor)?)
    }

    /// The events there are, without waiting.
    pub(super) fn take(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        match self.0.get_ref().0.wait(events, EpollTimeout::ZERO) {
            Ok(ready) => Ok(ready),
            Err(Errno::EINTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits until there may be events. To be called when [`WaitableEpoll::take`] found none: what comes
    /// after that raises a new edge in the runtime's own epoll. Cancel-safe.
    pub(super) async fn wait(&self) -> io::Result<()> {
        // the readiness is of what was taken since
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}
