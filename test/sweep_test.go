package e2e

import (
	"bufio"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mountsUnder lists the mount points at or under dir, the latest first.
func mountsUnder(dir string) []string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	devices := loopsUnder(dir)
	var points []string
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 10 {
			continue
		}
		point := strings.ReplaceAll(fields[4], `\040`, " ")
		if inside(point, dir) {
			points = append([]string{point}, points...)
			continue
		}
		for _, device := range devices { // mounted elsewhere, but ours
			if strings.Contains(s.Text(), " "+device+" ") {
				points = append([]string{point}, points...)
			}
		}
	}
	return points
}

func inside(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// loopsUnder lists the loop devices whose backing file lies under dir.
func loopsUnder(dir string) []string {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	var devices []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // detached meanwhile
		}
		// The kernel appends " (deleted)" to a file that has gone.
		if inside(strings.TrimSuffix(strings.TrimSpace(string(b)), " (deleted)"), dir) {
			devices = append(devices, "/dev/"+strings.Split(f, "/")[3])
		}
	}
	return devices
}

// sweep unmounts and detaches everything under dir and returns what it found.
func sweep(dir string) []string {
	found := map[string]bool{}
	for round := range 100 {
		points, devices := mountsUnder(dir), loopsUnder(dir)
		if len(points) == 0 && len(devices) == 0 {
			break
		}
		// Gently at first, in whatever order things release each other: a
		// lazy unmount would hide the backing file of a loop device from us.
		flags := 0
		if round >= 20 {
			flags = unix.MNT_FORCE | unix.MNT_DETACH
		}
		for _, p := range points {
			found[p] = true
			if unix.Unmount(p, flags) != nil && os.Geteuid() != 0 {
				_ = exec.Command("fusermount3", "-u", p).Run() // asked again in the next round
			}
		}
		for _, d := range devices {
			found[d] = true
			_ = exec.Command("losetup", "-d", d).Run() // asked again in the next round
		}
		time.Sleep(50 * time.Millisecond)
	}
	return slices.Sorted(maps.Keys(found))
}
