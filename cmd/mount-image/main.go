// Command mount-image shows a disk image (a ploop bundle, a qcow2 chain, a raw
// file) as one raw file in a directory.
package main

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/alecthomas/kong"

	"github.com/imagestack/imagestack/internal/cli"
)

// flags of the command line; see design section 6.
type flags struct {
	cli.Common
	cli.ImageFlags
	cli.SandboxFlags
	UID         string      `name:"uid" placeholder:"USER" help:"Let the server run as this user (root)."`
	Write       bool        `short:"w" help:"Make the disk writable; the image changes."`
	Scratch     bool        `help:"Make the disk writable into a throw-away layer; the image does not change."`
	Foreground  bool        `short:"f" help:"Stay in the foreground."`
	Flat        bool        `help:"Show the disk as one file that shares the storage of the images (reflinks: xfs, btrfs), read at the speed of that file; read-only, or thrown away with --scratch."`
	Partitions  bool        `help:"Also show the partitions, as p1, p2, …"`
	Loop        bool        `help:"Attach a loop device to the disk and print its name (root)."`
	SectorSize  uint32      `default:"0" placeholder:"BYTES" help:"Sector size of the loop device, 512 (default) or 4096."`
	Snapshot    string      `placeholder:"ID" help:"Show the disk as it was at this snapshot (id or name)."`
	Options     []string    `short:"o" sep:"none" placeholder:"OPT,…" help:"Options as of mount(8): ro, rw, allow_other, allow_root, uid=, gid=, umask=, and the flags of this tool as scratch, flat, partitions, loop, snapshot=, format=, backing_format=, allow_path=, cache_size=, sector_size=, log=, passthrough=, transport=, sandbox=, run_as= (as --uid)."`
	Transport   transport   `enum:"auto,dev,uring" default:"auto" help:"How requests come from the kernel: auto (over io_uring where it is switched on), dev (/dev/fuse) or uring (or fail)."`
	Passthrough passthrough `enum:"auto,on,off" default:"auto" help:"Let the kernel read a disk that is one raw file by itself: auto (read-only disks, where it can), on (writable ones too, or fail) or off."`
	Log         string      `placeholder:"FILE" help:"Append messages of the server in the background to FILE."`
	JSON        bool        `help:"Print one JSON document about the mount."`
	Unmount     bool        `short:"u" help:"Unmount DIR, detaching its loop devices, and wait until everything is durable."`
	Force       bool        `help:"With -u: unmount although the mount is in use."`
	Image       string      `arg:"" optional:"" help:"The image, or with -u a directory."`
	Dir         string      `arg:"" optional:"" help:"The directory to mount on."`
	More        []string    `arg:"" optional:"" name:"more" help:"With -u: more directories."`
}

func main() {
	if beKeeper() {
		os.Exit(cli.ExitOK)
	}
	var f flags
	cli.Main(cli.Tool{
		Name:        "mount-image",
		Description: "Show a disk image as one raw file, DIR/disk.raw. Read-only unless -w or --scratch is given.",
		Flags:       &f,
		Run:         func(ctx context.Context, _ *kong.Context) error { return run(ctx, &f) },
	})
}

func run(ctx context.Context, f *flags) error {
	if f.Unmount {
		if f.Image == "" {
			return cli.Usage(errors.New("-u wants a directory"))
		}
		if isApart() {
			return unmount(ctx, f.Image, f.Force)
		}
		dirs := slices.DeleteFunc(append([]string{f.Image, f.Dir}, f.More...), func(d string) bool { return d == "" })
		if f.Force {
			return unmountAll(ctx, dirs, unmountForced)
		}
		return unmountAll(ctx, dirs, unmountApart)
	}
	if f.Image == "" || f.Dir == "" || len(f.More) > 0 {
		return cli.Usage(errors.New("want an image and a directory"))
	}
	s, err := newSettings(f)
	if err != nil {
		return cli.Usage(err)
	}
	if err := beFlusher(f.Foreground); err != nil {
		return err
	}
	daemon := cli.DaemonChild()
	if daemon == nil && !f.Foreground {
		return cli.StartDaemon(ctx)
	}
	return serve(ctx, s, daemon)
}
