//! Told by the kernel when a file of the configuration changes: `run --watch-config`, `pathway watch`.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::config::Configuration;

/// How long it has to be quiet: an editor writes, renames and removes, a deployment changes three files.
const QUIET: Duration = Duration::from_millis(200);
/// However busy the directory, a reload is not put off longer than this.
const LONGEST: Duration = Duration::from_secs(2);

/// Watches directories, not files: editors and deployments replace files, and a watch goes with its inode.
pub(super) struct Watch(AsyncFd<Descriptor>);

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    /// A watch on nothing yet.
    pub(super) fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: the AsyncFd owns the inotify descriptor, whose number therefore stays the same and open
        // for as long as it is registered
        #[expect(
            unsafe_code,
            reason = "tokio cannot know that the number stays the same"
        )]
        let watched = unsafe { AsyncFd::register(Descriptor(inotify)) };
        Ok(Self(watched.map_err(io::Error::from)?))
    }

    /// Watches these directories; one that is watched stays so.
    pub(super) fn follow(&self, directories: impl IntoIterator<Item = PathBuf>) -> io::Result<()> {
        for directory in directories {
            let events = AddWatchFlags::IN_CLOSE_WRITE
                | AddWatchFlags::IN_CREATE
                | AddWatchFlags::IN_DELETE
                | AddWatchFlags::IN_MOVE
                | AddWatchFlags::IN_ATTRIB;
            self.0.get_ref().0.add_watch(&directory, events)?;
        }
        Ok(())
    }

    /// Waits for a change, and until it is quiet again. Cancel-safe: a change is told later then.
    pub(super) async fn changed(&self) -> io::Result<()> {
        drop(self.0.readable().await?);
        let settled = async {
            while let Ok(news) = timeout(QUIET, self.read()).await {
                news?;
            }
            Ok(())
        };
        timeout(LONGEST, settled).await.unwrap_or(Ok(()))
    }

    async fn read(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match self.0.get_ref().0.read_events() {
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Every directory that a configuration was read from.
pub(super) fn directories(configuration: &Configuration) -> BTreeSet<PathBuf> {
    let own = configuration.instances.iter().filter_map(|instance| {
        let file = instance.options.allow.as_ref()?;
        Some(configuration.directory.join(file))
    });
    let files = own.chain([configuration.default_allow_path.clone()]);
    let parents = files.filter_map(|file| file.parent().map(Path::to_owned));
    // a file named without a directory is in the current one
    let parents = parents.map(|parent| {
        if parent.as_os_str().is_empty() {
            PathBuf::from(".")
        } else {
            parent
        }
    });
    parents.chain([configuration.directory.clone()]).collect()
}
