//! `mmproxyctl demo`: as root, as nobody, without iptables; and that the host is as before.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::support::net::Host;

/// Runs the demonstration on a host of its own, through a shell script that gets the program as `$1`.
fn demo(host: &Host, script: &str) -> String {
    // where everybody may execute it, whoever owns the target directory
    let program = host.dir().join("mmproxyctl");
    std::fs::copy(env!("CARGO_BIN_EXE_mmproxyctl"), &program).expect("copy the program");
    let mode = |path: &Path| {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path, permissions).expect("set permissions");
    };
    mode(host.dir());
    mode(&program);

    let listings = || {
        let net = [
            "ip rule",
            "ip -6 rule",
            "ip route show table all",
            "ip -6 route show table all",
            "ip -o address",
            "iptables-save",
            "ip6tables-save",
        ];
        let net = net.map(|command| host.run(command));
        let run = Command::new("find")
            .args(["/run", "-maxdepth", "1", "-name", "mmproxy*"])
            .output();
        (net, run.expect("find").stdout)
    };
    let before = listings();
    let start = Instant::now();
    let Output {
        status,
        stdout,
        stderr,
    } = host
        .command("sh")
        .args(["-euc", script, "sh"])
        .arg(&program)
        // a caller's own list is not for the demonstration
        .env("ALLOW_LIST_PATH", "/nowhere")
        .output()
        .expect("sh");
    let took = start.elapsed();
    let (stdout, stderr) = (
        String::from_utf8(stdout).expect("UTF-8"),
        String::from_utf8(stderr).expect("UTF-8"),
    );
    assert!(status.success(), "{status}\n{stdout}\n{stderr}");
    assert!(took < Duration::from_secs(10), "took {took:?}\n{stdout}");
    assert_eq!(before, listings());
    stdout
}

/// Each way over each proxy in each family shows the client; without a pathway none does.
fn assert_story(story: &str) {
    let lines = |start: &str, end: &str| {
        story
            .lines()
            .filter(|line| line.contains(start) && line.contains(end))
            .count()
    };
    for client in ["203.0.113.7", "2001:db8:7::7"] {
        let to = |way: &str| format!("  {client} -> {way}");
        assert_eq!(
            lines(&to("vps01 -> port 22"), "saw 100.103.104.105:"),
            1,
            "{story}"
        );
        assert_eq!(
            lines(&to("vps01 -> vps01-ssh"), "saw nothing"),
            1,
            "{story}"
        );
        for way in [
            "vps01, v2 -> vps01-ssh (mark 123)",
            "vps01, v2 -> vps01-web (mark 123)",
            "router01, v1 -> router01-ssh (mark 124)",
        ] {
            let saw = if client.contains(':') {
                format!("saw [{client}]:")
            } else {
                format!("saw {client}:")
            };
            assert_eq!(lines(&to(way), &saw), 1, "{client} {way}\n{story}");
        }
    }
}

#[test]
fn demo_as_root() {
    let story = demo(&Host::new("root"), "exec \"$1\" demo");
    assert_story(&story);
    assert!(story.contains("ip6tables -t mangle"), "{story}");
}

#[test]
fn demo_as_nobody() {
    let story = demo(
        &Host::new("nobody"),
        "exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$1\" demo",
    );
    assert!(story.contains("in a user namespace"), "{story}");
    assert_story(&story);
}

#[test]
fn demo_without_iptables() {
    // an empty directory over each one that may hold it
    let story = demo(
        &Host::new("bare"),
        "exec unshare --mount --propagation private sh -euc '
            for name in iptables iptables-nft iptables-legacy; do
                for directory in $(echo $PATH:/usr/sbin:/sbin | tr : \" \"); do
                    [ ! -e $directory/$name ] || hide=\"${hide-} $(realpath $directory)\"
                done
            done
            for directory in $(printf \"%s\\n\" $hide | sort -u); do mount -t tmpfs none $directory; done
            exec \"$1\" demo' sh \"$1\"",
    );
    assert!(story.contains("connmark=off"), "{story}");
    assert_story(&story);
}
