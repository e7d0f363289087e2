//! The units under a real systemd: booted in namespaces on wks01, with mmproxyctl and the example files
//! installed as the README says, and real connections through it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use crate::chain::deployment::{CLIENT, Deployment, VPS01, shipped};
use crate::pathway::effects;
use crate::support::net::{Host, Running, wait_for};

/// A booted systemd. All of it dies with the value.
pub(crate) struct Systemd {
    // dropped first: it kills the namespaces' init, and with it everything in them
    unshare: Option<Running>,
    init: String,
    cgroup: PathBuf,
}

impl Systemd {
    pub(crate) fn boot(host: &Host) -> Self {
        let lab = host.dir().join("systemd");
        fs::create_dir(&lab).expect("create directory");
        let mut command = host.command("sh");
        command
            .arg(shipped("tests/it/systemd/boot.sh"))
            .arg(&lab)
            .arg(env!("CARGO_BIN_EXE_mmproxyctl"))
            .arg(shipped(""));
        let unshare = host.spawn(command);
        let children = format!("/proc/{0}/task/{0}/children", unshare.pid());
        let mut init = String::new();
        wait_for("systemd to be executed", || {
            let child = fs::read_to_string(&children).unwrap_or_default();
            init = child.trim().to_owned();
            let name = fs::read_to_string(format!("/proc/{init}/comm")).unwrap_or_default();
            assert!(!unshare.log().contains("failed"), "{}", unshare.log());
            name == "systemd\n"
        });
        let cgroup = fs::read_to_string(lab.join("cgroup")).expect("its cgroup");
        let booted = Self {
            unshare: Some(unshare),
            init,
            cgroup: cgroup.trim().into(),
        };
        wait_for("systemd to have booted", || {
            let state = booted.try_run("systemctl is-system-running").stdout;
            state == b"running\n" || state == b"degraded\n"
        });
        booted
    }

    /// Runs words beside its services.
    pub(crate) fn try_run(&self, words: &str) -> Output {
        Command::new("nsenter")
            .args(["-t", &self.init, "-m", "-u", "-i", "-n", "-p", "-C"])
            .args(words.split_whitespace())
            .stdin(Stdio::null())
            .output()
            .expect("nsenter")
    }

    pub(crate) fn run(&self, words: &str) -> String {
        let output = self.try_run(words);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{words}: {}\n{text}{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.journal()
        );
        text
    }

    /// Writes a file that its services see.
    pub(crate) fn write(&self, path: &str, text: &str) {
        let root = format!("/proc/{}/root{path}", self.init);
        fs::write(root, text).expect("write file");
    }

    /// Copies a file to where its services see it.
    #[cfg(feature = "soak")]
    pub(crate) fn copy(&self, from: &std::path::Path, to: &str) {
        let to = format!("/proc/{}/root{to}", self.init);
        fs::copy(from, to).expect("copy file");
    }

    /// Runs a shell script beside its services; what it leaves in the background goes on.
    pub(crate) fn run_script(&self, script: &str) {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let to_log = || log.reopen().expect("open the log");
        let status = Command::new("nsenter")
            .args([
                "-t", &self.init, "-m", "-u", "-i", "-n", "-p", "-C", "sh", "-euc", script,
            ])
            .stdin(Stdio::null())
            .stdout(to_log())
            .stderr(to_log())
            .status()
            .expect("nsenter");
        let said = || fs::read_to_string(log.path()).unwrap_or_default();
        assert!(
            status.success(),
            "{script}: {status}\n{}\n{}",
            said(),
            self.journal()
        );
    }

    pub(crate) fn journal(&self) -> String {
        let output = self.try_run("journalctl --no-pager -o cat -u mmproxy*");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Waits until units run; at the first that failed, shows what it said.
    pub(crate) fn wait_active(&self, units: &[&str]) {
        wait_for(&format!("{units:?} to be active"), || {
            let words = format!("systemctl is-active {}", units.join(" "));
            let states = String::from_utf8(self.try_run(&words).stdout).expect("UTF-8");
            assert!(!states.contains("failed"), "{states}{}", self.journal());
            states.lines().all(|state| state == "active")
        });
    }

    /// A property of a unit.
    pub(crate) fn show(&self, unit: &str, property: &str) -> String {
        self.run(&format!("systemctl show --value -p {property} {unit}"))
            .trim()
            .to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        drop(self.unshare.take());
        // the kernel lets a cgroup go once its last process has been reaped
        wait_for("the cgroups to be empty", || {
            let removed = Command::new("find")
                .arg(&self.cgroup)
                .args(["-depth", "-type", "d", "-delete"])
                .stderr(Stdio::null())
                .status();
            removed.is_ok() && !self.cgroup.exists()
        });
    }
}

const RELAY: &str = "mmproxy@vps01-ssh.service";

#[test]
fn units_carry_connections_and_clean_up() {
    let lab = Deployment::new();
    let listings = || {
        [
            "ip rule",
            "ip -6 rule",
            "ip route show table all",
            "ip -6 route show table all",
            "iptables-save",
            "ip6tables-save",
        ]
        .map(|command| lab.wks01.run(command))
    };
    let before = listings();
    let sshd = lab.sshd();
    let _proxies = lab.haproxies();
    let systemd = Systemd::boot(&lab.wks01);

    let verified = systemd.try_run(
        "systemd-analyze verify --man=no /etc/systemd/system/mmproxy-pathways.service /etc/systemd/system/mmproxy@.service",
    );
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(verified.status.success() && said.is_empty(), "{said}");

    // at boot: enabled, then pulled in by the target
    systemd.run("systemctl enable mmproxy-pathways mmproxy@vps01-ssh mmproxy@router01-ssh");
    systemd.run("systemctl start multi-user.target");
    systemd.wait_active(&[
        "mmproxy-pathways",
        "mmproxy@vps01-ssh",
        "mmproxy@router01-ssh",
    ]);

    for (port, (client, address)) in (44000..).zip(CLIENT.into_iter().zip(VPS01)) {
        let session = sshd.login(&lab.client, address, 22001, Some((client, port)));
        assert_eq!(session.client, (client.to_owned(), port));
        sshd.wait_login(client, port);
        session.close();
    }

    // no root, and exactly the three capabilities of the unit
    let pid = systemd.show(RELAY, "MainPID");
    let status = systemd.run(&format!("cat /proc/{pid}/status"));
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.expect(name)
            .split_whitespace()
            .next()
            .expect("a value")
            .to_owned()
    };
    assert_ne!(field("Uid:"), "0", "{status}");
    assert_eq!(field("NoNewPrivs:"), "1");
    // CAP_NET_RAW, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE
    let wanted = format!("{:016x}", 1 << 13 | 1 << 12 | 1 << 10);
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(field(set), wanted, "{set}");
    }

    // one relay goes, the runtime directory stays for the other, and the other for its clients
    systemd.run("systemctl stop mmproxy@router01-ssh");
    systemd.run("test -d /run/mmproxy");
    let mut session = sshd.login(&lab.client, VPS01[0], 22001, None);

    // a crash: systemd brings it back
    systemd.run("systemctl start mmproxy@router01-ssh");
    systemd.run("systemctl kill --signal=KILL mmproxy@router01-ssh");
    wait_for("a restart after a crash", || {
        systemd.show("mmproxy@router01-ssh", "NRestarts") == "1"
            && systemd.show("mmproxy@router01-ssh", "ActiveState") == "active"
    });
    session.echo("the other relay's connection is untouched");
    session.close();

    // the pathways are kept: what another program removes comes back at once, and no connection is lost
    let mut session = sshd.login(&lab.client, VPS01[0], 22001, None);
    let whole = effects(&lab.wks01);
    lab.wks01
        .ip("rule del priority 100 from 127.0.0.0/8 fwmark 123/0xff iif lo");
    lab.wks01.run("nft flush ruleset");
    session.echo("over a repair");
    wait_for("a repair", || {
        systemd.show("mmproxy-pathways", "StatusText") == "2 pathways in place, 13 repairs"
    });
    assert_eq!(effects(&lab.wks01), whole);
    let journal = systemd.journal();
    assert!(
        journal.contains("by=\"nft, pid ") || journal.contains("by=nft, pid "),
        "{journal}"
    );
    // a reload with a mistake changes nothing
    let conf = systemd.run("cat /etc/mmproxy/pathways.conf");
    systemd.write("/etc/mmproxy/pathways.conf", "12x\n");
    systemd.run("systemctl reload mmproxy-pathways");
    wait_for("the mistake to be told", || {
        systemd.journal().contains("'12x' is not a mark")
    });
    assert_eq!(effects(&lab.wks01), whole);
    systemd.write("/etc/mmproxy/pathways.conf", &conf);
    // what keeps them may die: the pathways and the relays stay, and it comes back
    let main_pid = |unit: &str| systemd.show(unit, "MainPID");
    let (relay, keeper) = (main_pid(RELAY), main_pid("mmproxy-pathways"));
    systemd.run("systemctl kill --signal=KILL --kill-who=main mmproxy-pathways");
    wait_for("the keeper to be back", || {
        systemd.show("mmproxy-pathways", "ActiveState") == "active"
            && main_pid("mmproxy-pathways") != keeper
    });
    assert_eq!(effects(&lab.wks01), whole);
    assert_eq!(main_pid(RELAY), relay);
    session.echo("over the keeper's death");
    session.close();

    // a wrong name is a configuration mistake: said once, not tried again
    assert!(
        !systemd
            .try_run("systemctl start mmproxy@nobody")
            .status
            .success()
    );
    assert_eq!(systemd.show("mmproxy@nobody", "ExecMainStatus"), "2");
    assert_eq!(systemd.show("mmproxy@nobody", "ActiveState"), "failed");
    assert_eq!(systemd.show("mmproxy@nobody", "NRestarts"), "0");

    // no relay outlives its pathway, and nothing of it is left
    systemd.run("systemctl stop mmproxy-pathways");
    assert_eq!(systemd.show(RELAY, "ActiveState"), "inactive");
    assert_eq!(systemd.show("mmproxy-pathways", "Result"), "success");
    assert_eq!(before, listings());
}

#[test]
fn the_relay_units_stay_hardened() {
    let host = Host::new("wks01");
    let systemd = Systemd::boot(&host);
    // systemd's own measure, 10 is unprotected; what is left is the network and its capabilities
    for unit in ["mmproxy.service", "mmproxy@vps01-ssh.service"] {
        systemd.run(&format!(
            "systemd-analyze security --no-pager --threshold=20 {unit}"
        ));
    }
}

#[test]
fn units_work_with_iptables_legacy() {
    let host = Host::new("wks01");
    host.address("lo", "100.101.102.123/32");
    let systemd = Systemd::boot(&host);
    for name in [
        "iptables",
        "iptables-save",
        "iptables-restore",
        "ip6tables",
        "ip6tables-save",
        "ip6tables-restore",
    ] {
        systemd.run(&format!("ln -sf xtables-legacy-multi /usr/sbin/{name}"));
    }
    systemd.run("systemctl start mmproxy-pathways mmproxy@vps01-ssh");
    assert_eq!(systemd.show(RELAY, "ActiveState"), "active");
    let connmark_lines = || {
        ["iptables-legacy-save", "ip6tables-legacy-save"]
            .map(|save| host.run(save).matches("-j CONNMARK").count())
    };
    assert_eq!(connmark_lines(), [6, 6]);
    assert_eq!(host.run("iptables-nft-save").matches("CONNMARK").count(), 0);
    systemd.run("systemctl stop mmproxy-pathways");
    assert_eq!(systemd.show(RELAY, "ActiveState"), "inactive");
    assert_eq!(connmark_lines(), [0, 0]);
}

#[test]
fn networkd_leaves_pathways_alone_when_told() {
    let (host, peer) = (Host::new("wks01"), Host::new("peer"));
    host.link("eth0", &[], &peer, "eth0", &[]);
    let systemd = Systemd::boot(&host);
    systemd.write(
        "/etc/systemd/network/eth0.network",
        "[Match]\nName=eth0\n[Network]\nAddress=10.0.0.1/24\n",
    );
    let reconfigure = || {
        let configured = || host.ip("address show dev eth0").contains("10.0.0.1/24");
        systemd.run("systemctl restart systemd-networkd");
        wait_for("systemd-networkd to configure its interface", configured);
        host.ip("address flush dev eth0");
        // drops what is foreign, then puts the address back
        systemd.run("networkctl reconfigure eth0");
        wait_for(
            "systemd-networkd to configure its interface again",
            configured,
        );
    };
    let in_place = || systemd.try_run("mmproxyctl pathway check").status.success();
    let repairs = || {
        let status = systemd.show("mmproxy-pathways", "StatusText");
        let words = status.split_whitespace().rev().nth(1).map(str::to_owned);
        let count = words.and_then(|word| word.parse::<u64>().ok());
        count.unwrap_or_else(|| panic!("no count of repairs in '{status}'"))
    };
    systemd.run("systemctl start dbus.socket");
    // what the drop-in is for
    systemd.run("mmproxyctl pathway add-all");
    assert!(in_place());
    reconfigure();
    wait_for("systemd-networkd to remove rules", || !in_place());
    // without it, and with somebody who keeps them
    systemd.run("systemctl start mmproxy-pathways");
    assert!(in_place());
    reconfigure();
    wait_for("the repair of what systemd-networkd removed", || {
        repairs() > 0 && in_place()
    });

    systemd.run("mkdir -p /etc/systemd/networkd.conf.d");
    let drop_in = fs::read_to_string(shipped("systemd/mmproxy-networkd.conf")).expect("drop-in");
    systemd.write("/etc/systemd/networkd.conf.d/mmproxy.conf", &drop_in);
    systemd.run("systemctl restart mmproxy-pathways");
    reconfigure();
    assert!(in_place(), "{}", systemd.journal());
    systemd.run("networkctl reload");
    systemd.run("systemctl restart systemd-networkd");
    wait_for("systemd-networkd to be back", || {
        systemd.show("systemd-networkd", "ActiveState") == "active"
    });
    assert!(in_place(), "{}", systemd.journal());
    // and not because they were put back
    assert_eq!(repairs(), 0, "{}", systemd.journal());
}
