//! The runtime directory: lock files, and later control sockets, named by what they belong to *and*
//! by network namespace, because two namespaces are two hosts.
//!
//! Owns: the directory, the names in it, advisory locks. Must not know: what a lock protects.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where runtime files live.
#[derive(Debug, Clone)]
pub struct RuntimeDir(PathBuf);

/// Why a runtime file could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file-system operation failed.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another process held the lock for all of the time allowed.
    #[error("{} is held by pid {} for more than {limit:?}", path.display(), holder.map_or("?".to_owned(), |pid| pid.to_string()))]
    Busy {
        /// The lock file.
        path: PathBuf,
        /// Who holds it, where it said so.
        holder: Option<u32>,
        /// How long was waited.
        limit: Duration,
    },
}

/// The outcome of trying a lock once.
#[derive(Debug)]
pub enum Attempt {
    /// It is ours until dropped.
    Held(Lock),
    /// Another process has it; its pid where it wrote one.
    HeldBy(Option<u32>),
}

/// An advisory lock with the holder's pid in it. The kernel drops it with the process; the file stays.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// The same lock for another process: it is free when both have let go of it.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Takes over a lock that another process shared, in this process's name.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn take_over(descriptor: OwnedFd) -> io::Result<Self> {
        let mut lock = Self {
            file: File::from(descriptor),
        };
        lock.sign()?;
        Ok(lock)
    }

    fn sign(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "{}", std::process::id())
    }
}

impl RuntimeDir {
    /// `--runtime-dir`, else `$RUNTIME_DIRECTORY` (systemd; its first entry), else `/run/mmproxy`.
    pub fn resolve(flag: Option<PathBuf>) -> Self {
        let from_systemd = || {
            let value = std::env::var("RUNTIME_DIRECTORY").ok()?;
            value
                .split(':')
                .next()
                .filter(|dir| !dir.is_empty())
                .map(PathBuf::from)
        };
        Self(
            flag.or_else(from_systemd)
                .unwrap_or_else(|| PathBuf::from("/run/mmproxy")),
        )
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// `NAME@NETNS.SUFFIX` in the directory; NETNS is the inode number of the caller's network namespace.
    ///
    /// # Errors
    /// When `/proc` is not there to tell the namespace.
    pub fn file(&self, name: &str, suffix: &str) -> Result<PathBuf, Error> {
        let link = Path::new("/proc/thread-self/ns/net");
        let namespace = fs::metadata(link)
            .map_err(io_error("read the network namespace from", link))?
            .ino();
        Ok(self.0.join(format!("{name}@{namespace}.{suffix}")))
    }

    /// The files `NAME@NETNS.SUFFIX` of the caller's network namespace with their names, sorted; none
    /// where the directory is not there.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn files(&self, suffix: &str) -> Result<Vec<(String, PathBuf)>, Error> {
        let tail = self.file("", suffix)?;
        let tail = tail.file_name().unwrap_or_default().to_string_lossy();
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read", &self.0)(error)),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("read", &self.0))?;
            if let Some(name) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_suffix(&*tail))
            {
                files.push((name.to_owned(), entry.path()));
            }
        }
        files.sort_unstable();
        Ok(files)
    }

    /// Tries the lock of that name once.
    ///
    /// # Errors
    /// When the directory or the file cannot be made.
    pub fn try_lock(&self, name: &str) -> Result<Attempt, Error> {
        let path = self.file(name, "lock")?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.0)
            .map_err(io_error("create directory", &self.0))?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // root shares the directory with the relays' user, who must not be able to lead it elsewhere
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(io_error("open", &path))?;
        self.share(&file);
        match file.try_lock() {
            Ok(()) => {
                let mut lock = Lock { file };
                lock.sign().map_err(io_error("write", &path))?;
                Ok(Attempt::Held(lock))
            }
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // the holder may be between lock and write: no pid is an answer, not an error
                let _ = file.read_to_string(&mut text);
                Ok(Attempt::HeldBy(text.trim().parse().ok()))
            }
            Err(TryLockError::Error(source)) => Err(io_error("lock", &path)(source)),
        }
    }

    /// Gives a file that root has made to the directory's owner: an instance that was run by hand
    /// once must be able to start under the relays' user later.
    fn share(&self, file: &File) {
        if let (Ok(directory), Ok(made)) = (fs::metadata(&self.0), file.metadata())
            && (made.uid(), made.nlink()) == (0, 1)
            && directory.uid() != 0
        {
            // without CAP_CHOWN (the pathways' unit) it stays root's, and only root locks it there
            let _ = fchown(file, Some(directory.uid()), Some(directory.gid()));
        }
    }

    /// Waits for the lock of that name, at most `limit`.
    ///
    /// # Errors
    /// [`Error::Busy`] when the time is over, else as [`RuntimeDir::try_lock`].
    pub fn lock(&self, name: &str, limit: Duration) -> Result<Lock, Error> {
        let start = Instant::now();
        loop {
            match self.try_lock(name)? {
                Attempt::Held(lock) => return Ok(lock),
                Attempt::HeldBy(holder) if start.elapsed() >= limit => {
                    return Err(Error::Busy {
                        path: self.file(name, "lock")?,
                        holder,
                        limit,
                    });
                }
                Attempt::HeldBy(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

fn io_error<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> Error + use<'a> {
    move |source| Error::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::resolve(Some(dir.path().to_owned()));
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, runtime.file("pathways", "lock").unwrap()).unwrap();
        assert!(runtime.try_lock("pathways").is_err());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    }

    #[test]
    fn what_root_locks_in_the_relays_directory_is_theirs() {
        const RELAYS: u32 = 65534;
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::resolve(Some(dir.path().to_owned()));
        std::os::unix::fs::chown(dir.path(), Some(RELAYS), Some(RELAYS))
            .expect("this test gives a directory away: run it as root");
        let _lock = runtime.try_lock("vps01-ssh").unwrap();
        let made = fs::metadata(runtime.file("vps01-ssh", "lock").unwrap()).unwrap();
        assert_eq!((made.uid(), made.gid()), (RELAYS, RELAYS));
    }

    #[test]
    fn a_second_lock_names_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::resolve(Some(dir.path().join("new")));
        let Attempt::Held(lock) = runtime.try_lock("vps01-ssh").unwrap() else {
            panic!("free lock not held")
        };
        // flock is per open file description: a second open in the same process conflicts too
        match runtime.try_lock("vps01-ssh").unwrap() {
            Attempt::HeldBy(pid) => assert_eq!(pid, Some(std::process::id())),
            Attempt::Held(_) => panic!("held twice"),
        }
        assert!(matches!(
            runtime.lock("vps01-ssh", Duration::from_millis(50)),
            Err(Error::Busy { .. })
        ));
        drop(lock);
        assert!(matches!(
            runtime.try_lock("vps01-ssh").unwrap(),
            Attempt::Held(_)
        ));
    }
}
