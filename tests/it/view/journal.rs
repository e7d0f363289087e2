//! Log lines in a real journal: systemd-journald in a mount namespace of the test's own, read by journalctl.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::{Lab, v1};
use crate::support::net::{Running, wait_for};

/// Starts mmproxyctl behind a journald that only it sees; what journald stores is in `journal/` under
/// the host's directory.
fn run_with_journal(lab: &Lab, words: &str) -> Running {
    let run = lab.host.mmproxyctl(words);
    let arguments: Vec<String> = std::iter::once(run.get_program())
        .chain(run.get_args())
        .map(|word| format!("'{}'", word.to_str().expect("UTF-8")))
        .collect();
    let dir = lab.host.dir().display();
    // /dev/null as kmsg: the machine's own kernel messages are no part of this
    let script = format!(
        "set -e
        mkdir -p {dir}/journal {dir}/etc-systemd
        mount --bind {dir}/run /run/mmproxy 2>/dev/null || true
        mount -t tmpfs tmpfs /run
        mkdir -p /run/systemd/journal /run/log/journal
        mount --bind {dir}/journal /run/log/journal
        mount --bind /dev/null /dev/kmsg
        cat /proc/sys/kernel/random/uuid | tr -d - > /run/machine-id
        touch /etc/machine-id
        mount --bind /run/machine-id /etc/machine-id
        /lib/systemd/systemd-journald &
        until [ -S /run/systemd/journal/socket ]; do sleep 0.05; done
        exec {}\n",
        arguments.join(" ")
    );
    let script = lab.host.write("journal.sh", script);
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut command = lab.host.command("unshare");
    command
        .args([
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["sh", &script.display().to_string()]);
    lab.host.spawn(command)
}

fn journalctl(lab: &Lab, words: &str) -> String {
    let output = Command::new("journalctl")
        .arg("--directory")
        .arg(lab.host.dir().join("journal"))
        .args(["--no-pager", "-q"])
        .args(words.split_whitespace())
        .output()
        .expect("journalctl: install systemd");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_journal_finds_connections_by_client() {
    let lab = Lab::new();
    let words = "-v --log-format journald run --all --manage-pathways";
    let relay = run_with_journal(&lab, words);
    wait_for(
        &format!("the start in the journal\n{}", relay.log()),
        || journalctl(&lab, "-o cat").contains("ready"),
    );
    drop(lab.client(&v1("203.0.113.7", 40_000), "hello"));
    drop(lab.client(&v1("203.0.113.8", 40_000), "hello"));
    wait_for("both in the journal", || {
        journalctl(&lab, "CLIENT=203.0.113.8 -o cat").contains("closed")
    });
    let lines = journalctl(&lab, "CLIENT=203.0.113.7 -o cat");
    assert_eq!(lines.lines().count(), 1, "{lines}");
    assert!(
        lines.starts_with("web: closed client.addr=203.0.113.7:40000"),
        "{lines}"
    );
    let json = journalctl(&lab, "CLIENT=203.0.113.7 INSTANCE=web -o json");
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    for (field, value) in [
        ("CLIENT_ADDR", "203.0.113.7:40000"),
        ("PROXY", "127.0.0.1"),
        ("TARGET", "127.0.0.1"),
        ("TARGET_ADDR", "127.0.0.1:22"),
        ("BYTES_IN", "5"),
        ("BYTES_OUT", "5"),
        ("REASON", "closed"),
        ("PRIORITY", "7"),
        ("SYSLOG_IDENTIFIER", "mmproxyctl"),
    ] {
        assert_eq!(json[field], value, "{field} in {json}");
    }
}
