//! `net.ipv4.tcp_fwmark_accept`, on which pathways without a firewall rely: read, turned on, recorded,
//! turned off again.
//!
//! It is the network namespace's, and others may have turned it on before: only what this program
//! turned on is recorded, with the marks that need it, and turned off with the last of them. The record
//! lives in the runtime directory, which goes when the machine stops, as the switch's position does.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::model::Mark;
use crate::pathway::piece::Step;
use crate::runtime_dir::{self, RuntimeDir};

const PATH: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";

/// Why it could not be read or turned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The runtime directory cannot be named.
    #[error(transparent)]
    RuntimeDir(#[from] runtime_dir::Error),
}

/// Its position, and whose doing that is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Switch {
    /// Whether it is on; `None` where the kernel has none.
    pub on: Option<bool>,
    /// The marks for which this program turned it on; `None` where it did not, or is not known to have.
    pub ours: Option<BTreeSet<Mark>>,
}

impl Switch {
    /// Reads the position and, with a runtime directory, the record.
    pub(crate) fn read(runtime_dir: Option<&RuntimeDir>) -> Result<Self, Error> {
        let on = match fs::read_to_string(PATH) {
            Ok(text) => Some(text.trim() != "0"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(file("read", Path::new(PATH))(source)),
        };
        let ours = runtime_dir.map(Record::read).transpose()?.flatten();
        Ok(Self { on, ours })
    }
}

fn file(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// The marks that need the switch, one a line.
struct Record(PathBuf);

impl Record {
    fn of(runtime_dir: &RuntimeDir) -> Result<Self, Error> {
        Ok(Self(runtime_dir.file("tcp_fwmark_accept", "marks")?))
    }

    fn read(runtime_dir: &RuntimeDir) -> Result<Option<BTreeSet<Mark>>, Error> {
        let Self(path) = Self::of(runtime_dir)?;
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(
                text.lines().filter_map(|line| line.parse().ok()).collect(),
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(file("read", &path)(source)),
        }
    }

    /// Replaces it in one step, so that a run that is killed leaves the old one or the new.
    fn write(&self, marks: &BTreeSet<Mark>) -> Result<(), Error> {
        let Self(path) = self;
        let new = path.with_extension("new");
        let text: String = marks.iter().map(|mark| format!("{mark}\n")).collect();
        fs::write(&new, text).map_err(file("write", &new))?;
        fs::rename(&new, path).map_err(file("write", path))
    }
}

fn turn(on: bool) -> Result<(), Error> {
    fs::write(PATH, if on { "1" } else { "0" }).map_err(file("write", Path::new(PATH)))
}

/// Makes a step of the switch.
pub(crate) fn write(step: &Step, runtime_dir: &RuntimeDir) -> Result<(), Error> {
    let marks = Record::read(runtime_dir)?.unwrap_or_default();
    let record = Record::of(runtime_dir)?;
    match step {
        // the record first: a run that is killed in between must not forget that it is ours
        Step::TakeSwitch(step) => {
            record.write(&marks.into_iter().chain([step.mark]).collect())?;
            if step.turns {
                turn(true)?;
            }
        }
        Step::LeaveSwitch(step) => {
            if step.turns {
                turn(false)?;
            }
            let left: BTreeSet<Mark> = marks
                .into_iter()
                .filter(|mark| *mark != step.mark)
                .collect();
            if left.is_empty() {
                let Record(path) = record;
                fs::remove_file(&path).map_err(file("remove", &path))?;
            } else {
                record.write(&left)?;
            }
        }
        _ => {}
    }
    Ok(())
}
