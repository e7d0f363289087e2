//! Told by the kernel when a file of the configuration changes: `run --watch-config`, `pathway watch`.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use crate::config::Configuration;

/// How long it has to be quiet: an editor writes, renames and removes, a deployment changes three files.
const QUIET: Duration = Duration::from_millis(200);
/// However busy the directory, a reload is not put off longer than this.
const LONGEST: Duration = Duration::from_secs(2);

/// Watches directories, not files: editors and deployments replace files, and a watch goes with its inode.
pub(super) struct Watch {
    descriptor: AsyncFd<Descriptor>,
    /// The first and the last change that [`Watch::changed`] has not told of yet.
    told: Cell<Option<(Instant, Instant)>>,
}

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
        Ok(Self {
            descriptor: watched.map_err(io::Error::from)?,
            told: Cell::default(),
        })
    }

    /// Watches these directories; one that is watched stays so.
    pub(super) fn follow(&self, directories: impl IntoIterator<Item = PathBuf>) -> io::Result<()> {
        for directory in directories {
            let events = AddWatchFlags::IN_CLOSE_WRITE
                | AddWatchFlags::IN_CREATE
                | AddWatchFlags::IN_DELETE
                | AddWatchFlags::IN_MOVE
                | AddWatchFlags::IN_ATTRIB;
            self.descriptor.get_ref().0.add_watch(&directory, events)?;
        }
        Ok(())
    }

    /// Waits for a change, and until it is quiet again. Cancel-safe: a change is told later then.
    pub(super) async fn changed(&self) -> io::Result<()> {
        loop {
            let Some((first, last)) = self.told.get() else {
                self.read().await?;
                let now = Instant::now();
                self.told.set(Some((now, now)));
                continue;
            };
            let until = (last + QUIET).min(first + LONGEST);
            match timeout_at(until, self.read()).await {
                Ok(news) => {
                    news?;
                    self.told.set(Some((first, Instant::now())));
                }
                Err(_elapsed) => {
                    self.told.set(None);
                    return Ok(());
                }
            }
        }
    }

    /// Takes what there is of changes, at least one. Cancel-safe: nothing is waited for once they are taken.
    async fn read(&self) -> io::Result<()> {
        loop {
            let mut ready = self.descriptor.readable().await?;
            match self.descriptor.get_ref().0.read_events() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    #[test]
    fn a_change_is_told_however_often_the_wait_for_it_is_given_up() {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let watch = Watch::new().unwrap();
            watch.follow([directory.path().to_owned()]).unwrap();
            std::fs::write(directory.path().join("pathways.conf"), "123\n").unwrap();
            // as in a loop that has other things to do more often than a change takes to settle
            let moment = QUIET / 4;
            let mut waits = 0;
            while timeout(moment, watch.changed()).await.is_err() {
                waits += 1;
                assert!(waits < 100, "the change was lost");
            }
            assert!(waits > 0, "it was not waited for the quiet after it");
            // and once
            assert!(timeout(2 * QUIET, watch.changed()).await.is_err());
        });
    }
}
