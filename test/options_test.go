package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"golang.org/x/sys/unix"
)

// TestPartitions reads and writes through the views of partitions, of a GPT
// and of an MBR with a logical partition.
func TestPartitions(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "sfdisk", "qemu-img")
	const mib = 1 << 20
	for _, c := range []struct {
		name, table string
		want        map[string][2]int64 // offset and length
	}{
		{"gpt", "label: gpt\nstart=2048, size=4096\nstart=8192, size=2048\n",
			map[string][2]int64{"p1": {mib, 2 * mib}, "p2": {4 * mib, mib}}},
		{"mbr", "label: dos\nstart=2048, size=4096, type=83\nstart=8192, size=16384, type=5\nstart=10240, size=2048, type=83\nstart=14336, size=2048, type=83\n",
			map[string][2]int64{"p1": {mib, 2 * mib}, "p5": {5 * mib, mib}, "p6": {7 * mib, mib}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := workDir(t)
			raw, image := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.qcow2")
			imgtest.RawFile(t, raw, 16*mib, 4096, 3)
			imgtest.Run(t, "sh", "-c", "printf '"+strings.ReplaceAll(c.table, "\n", `\n`)+"' | sfdisk -q --wipe=always "+raw)
			imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", raw, image)

			m := mountImage(t, image, "-w", "--partitions")
			entries, err := os.ReadDir(m.dir)
			if err != nil {
				t.Fatal(err)
			}
			// One for each, and the disk. An extended partition may be shown.
			for _, e := range entries {
				if _, ok := c.want[e.Name()]; !ok && e.Name() != "disk.raw" && !(c.name == "mbr" && e.Name() == "p2") {
					t.Errorf("unexpected view %s", e.Name())
				}
			}
			for name, at := range c.want {
				view := filepath.Join(m.dir, name)
				st, err := os.Stat(view)
				if err != nil {
					t.Error(err)
					continue
				}
				if st.Size() != at[1] {
					t.Errorf("%s: %d bytes, want %d", name, st.Size(), at[1])
				}
				wantBytes(t, name, readRange(t, view, 0, int(at[1])), readRange(t, raw, at[0], int(at[1])))
				writeRange(t, view, 12345, []byte("written through "+name))
			}
			m.unmount()
			m = mountImage(t, image)
			for name, at := range c.want {
				want := []byte("written through " + name)
				wantBytes(t, name+" through the disk", readRange(t, m.file(), at[0]+12345, len(want)), want)
			}
			m.unmount()
		})
	}
}

// TestSnapshots mounts what qcow2 and ploop keep beside the current state.
func TestSnapshots(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img", "qemu-io")
	t.Run("qcow2", func(t *testing.T) {
		image := filepath.Join(workDir(t), "s.qcow2")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", image, "16M")
		imgtest.QemuIO(t, "qcow2", image, "write -P 1 0 1M")
		imgtest.QemuImg(t, "snapshot", "-c", "monday", image)
		imgtest.QemuIO(t, "qcow2", image, "write -P 2 0 1M")
		wantSnapshot(t, image, "monday", 1)
		wantSnapshot(t, image, "1", 1)
		wantSnapshot(t, image, "", 2)
		wantExit(t, 1, "mount-image", "--snapshot", "tuesday", image, mountPoint(t))
	})
	t.Run("ploop", func(t *testing.T) {
		dir := workDir(t)
		imgtest.PloopBundle(t, dir, "expanded", 2, 32<<20, 1)
		imgtest.QemuIO(t, "parallels", filepath.Join(dir, "root.hds"), "write -P 1 0 1M")
		xml := filepath.Join(dir, "DiskDescriptor.xml")
		out := imgtest.PloopRun(t, "snapshot", xml)
		chain := imgtest.PloopChain(t, xml)
		imgtest.QemuIO(t, "", imgtest.Chain(chain...), "write -P 2 0 1M")
		list := strings.Fields(imgtest.PloopRun(t, "snapshot-list", "-H", "-o", "uuid,fname", xml))
		if len(list) != 4 || filepath.Base(list[1]) != "root.hds" {
			t.Fatalf("snapshot-list: %q (%s)", list, out)
		}
		wantSnapshot(t, dir, list[0], 1)
		wantSnapshot(t, xml, "", 2)
	})
}

func wantSnapshot(t *testing.T, image, id string, fill byte) {
	t.Helper()
	var flags []string
	if id != "" {
		flags = []string{"--snapshot", id}
	}
	m := mountImage(t, image, flags...)
	wantBytes(t, "snapshot "+id, readRange(t, m.file(), 0, 1<<20), bytes.Repeat([]byte{fill}, 1<<20))
	m.unmount()
}

// mountScript mounts in a namespace of its own in which the tools under test
// are installed: mount(8) takes PATH away from its helpers. It prints what the
// test looks at, and unmounts. $1 is the directory of the tools, $2 the mount
// point, $3 a command to run on the mount, and mount(8) gets the rest.
const mountScript = `
bin=$1 mnt=$2 command=$3
shift 3
mount --bind "$bin" /usr/local/bin
mount "$@"
cd "$mnt"
sh -ec "$command"
cd /
grep " $mnt " /proc/self/mountinfo
umount "$mnt"
`

// TestMountCommand goes through mount(8), by type and by a line of fstab.
func TestMountCommand(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireRoot(t)
	imgtest.Require(t, "mount", "umount", "unshare", "mount.fuse", "qemu-img", "qemu-io")
	dir := workDir(t)
	image := filepath.Join(dir, "m.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", image, "16M")
	imgtest.QemuIO(t, "qcow2", image, "write -P 0x37 1M 1M")

	byType := func(mnt, options string) []string {
		return []string{"-t", "fuse.mount-image", "-o", options, image, mnt}
	}
	byFstab := func(mnt, options string) []string {
		fstab := filepath.Join(dir, "fstab")
		text := image + " " + mnt + " fuse.mount-image " + options + ",noauto 0 0\n"
		if err := os.WriteFile(fstab, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return []string{"-T", fstab, mnt}
	}
	mount := func(t *testing.T, command string, args func(mnt, options string) []string, options string) (int, string) {
		mnt := mountPoint(t)
		argv := append([]string{"-m", "sh", "-ec", mountScript, "sh", binDir, mnt, command}, args(mnt, options)...)
		return imgtest.Try(t, "unshare", argv...)
	}
	for name, args := range map[string]func(mnt, options string) []string{"type": byType, "fstab": byFstab} {
		t.Run(name, func(t *testing.T) {
			exit, out := mount(t, "stat -c '%u %g %a' disk.raw; dd if=disk.raw bs=4 skip=262144 count=1 status=none; echo",
				args, "ro,allow_other,uid=12,gid=34,umask=027")
			if exit != 0 || !strings.HasPrefix(out, "12 34 440\n7777\n") {
				t.Fatalf("exit %d, want owner 12, group 34, mode 440 and 7777\n%s", exit, out)
			}
			if !strings.Contains(out, "fuse.mount-image "+image+" ro") {
				t.Errorf("the kernel does not show type, image and ro\n%s", out)
			}
			exit, out = mount(t, "printf written | dd of=disk.raw bs=1 seek=5000000 conv=notrunc status=none", args, "rw")
			if exit != 0 {
				t.Fatalf("rw: exit %d\n%s", exit, out)
			}
			waitReleased(t, image)
			if exit, out := imgtest.QemuCheck(t, image, "qcow2"); exit != 0 {
				t.Errorf("check: exit %d\n%s", exit, out)
			}
			if out := imgtest.QemuIO(t, "qcow2", image, "read -v 5000000 7"); !strings.Contains(out, "77 72 69 74 74 65 6e") {
				t.Errorf("what was written is not in the image\n%s", out)
			}
			imgtest.QemuIO(t, "qcow2", image, "write -z 4M 1M")
		})
	}
	// What cannot be mounted is mount's failure as well, with the reason.
	exit, out := mount(t, "true", byType, "no_such_option")
	if exit == 0 || !strings.Contains(out, "mount-image: ") || !strings.Contains(out, "no_such_option") {
		t.Errorf("an unknown option: exit %d\n%s", exit, out)
	}
}

// waitReleased waits until the server has closed the image: umount(8) does not.
func waitReleased(t *testing.T, image string) {
	t.Helper()
	for range 500 {
		if exit, _ := imgtest.Try(t, "qemu-img", "info", image); exit == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("the image stays locked after umount")
}

// TestSignals: SIGTERM and SIGINT make everything durable and unmount.
func TestSignals(t *testing.T) {
	imgtest.RequireFuse(t)
	for _, f := range formats {
		for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGINT} {
			t.Run(f.name+"/"+unix.SignalName(sig), func(t *testing.T) {
				image := f.create(t, workDir(t), 32<<20, true)
				m := serveImage(t, image, "-w")
				disk, err := os.OpenFile(m.file(), os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				want := imgtest.PatternBytes(5, 0, 3<<20)
				if _, err := disk.WriteAt(want, 1000); err != nil {
					t.Fatal(err)
				}
				disk.Close()
				if err := m.cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
				_ = m.cmd.Wait()
				if code := m.cmd.ProcessState.ExitCode(); code != 0 && !(sig == unix.SIGINT && code == 130) {
					t.Errorf("exit %d\n%s", code, slurp(t, m.log))
				}
				if left := mountsUnder(m.dir); len(left) > 0 {
					t.Errorf("still mounted: %q", left)
				}
				f.check(t, image, false)
				m = mountImage(t, image)
				wantBytes(t, "after the signal", readRange(t, m.file(), 1000, len(want)), want)
				m.unmount()
			})
		}
	}
}

// TestKilledWithLoop: after kill -9 of a server under a loop device with a
// mounted guest, -u clears everything away.
func TestKilledWithLoop(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "mount")
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			image := f.create(t, workDir(t), 64<<20, true)
			m := serveImage(t, image, "-w", "--loop")
			for range 500 {
				if l := loopsUnder(m.dir); len(l) == 1 {
					m.loop = l[0]
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			if m.loop == "" {
				t.Fatal("no loop device")
			}
			imgtest.Run(t, "mkfs.ext4", "-q", "-F", m.loop)
			mnt, _ := mountGuest(t, m.loop, "rw")
			want := imgtest.PatternBytes(6, 0, 1<<20)
			writeNew(t, filepath.Join(mnt, "synced"), want)
			m.kill()
			// The guest filesystem has lost its disk; unmounting it may say so.
			imgtest.Try(t, "umount", mnt)
			wantExit(t, 0, "mount-image", "-u", m.dir)
			if left := append(mountsUnder(m.dir), loopsUnder(m.dir)...); len(left) > 0 {
				t.Fatalf("-u left %q", left)
			}
			f.check(t, image, true)

			m = mountImage(t, image, "-w", "--loop")
			mnt, umount := mountGuest(t, m.loop, "rw") // replays the journal
			got, err := os.ReadFile(filepath.Join(mnt, "synced"))
			if err != nil {
				t.Fatal(err)
			}
			wantBytes(t, "the synced file", got, want)
			umount()
			imgtest.Run(t, "e2fsck", "-fn", m.loop)
			m.unmount()
		})
	}
}

func writeNew(t *testing.T, path string, p []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	writeRange(t, path, 0, p)
}
