//! Finding a program and running it, with a limit on its time and its own words when it fails.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::Error;

/// How many seconds iptables may wait for another run of it (`/run/xtables.lock`).
pub(super) const LOCK_SECONDS: u64 = 5;

/// How long one run may take in all.
const RUN_LIMIT: Duration = Duration::from_secs(LOCK_SECONDS + 10);

/// Where the programs are on systems that keep them out of a user's PATH.
const SBIN: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// The file of this name in PATH.
pub(super) fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// The file of this name in the sbin directories.
pub(super) fn in_sbin(name: &str) -> Option<PathBuf> {
    SBIN.iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|file| file.is_file())
}

/// Runs a program with this on its stdin, and returns its stdout.
pub(super) async fn run(program: &str, args: &[&str], input: &str) -> Result<String, Error> {
    let failed = |source| Error::Run {
        program: program.to_owned(),
        source,
    };
    let mut child = tokio::process::Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let stdin = child.stdin.take();
    let run = async {
        if let Some(mut stdin) = stdin {
            match stdin.write_all(input.as_bytes()).await {
                // it stopped reading: its exit status says why
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                written => written?,
            }
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(RUN_LIMIT, run)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Failed {
        program: program.to_owned(),
        status: output.status.to_string(),
        said: explain(&String::from_utf8_lossy(&output.stderr), input),
    })
}

/// What the program said in one line, with the line of the input that it names.
fn explain(said: &str, input: &str) -> String {
    let lines = said.lines().map(str::trim);
    let mut text = lines
        .filter(|line| !line.is_empty() && !line.starts_with("# Warning"))
        .collect::<Vec<_>>()
        .join("; ");
    let number = said
        .split_once("line ")
        .and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next())
        .and_then(|number| number.parse::<usize>().ok());
    if let Some(line) = number.and_then(|number| input.lines().nth(number.checked_sub(1)?)) {
        text.push_str(&format!(" (at '{line}')"));
    }
    text
}
