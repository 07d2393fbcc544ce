package main

import (
	"context"
	"errors"
	"os"
)

// sharing makes a filesystem that shares storage between files (xfs), for
// images of that many bytes in all, and returns the directory where it is
// mounted and what takes it away again.
func (s *imageStore) sharing(ctx context.Context, name string, bytes int64) (dir string, end func() error, err error) {
	if os.Geteuid() != 0 {
		return "", nil, errors.New("mounting a filesystem with reflinks needs root")
	}
	file := s.path(name + ".xfs")
	dir = s.path(name)
	end = s.cleanup.add(func() error {
		detachMount(dir)
		return errors.Join(os.RemoveAll(dir), os.Remove(file))
	})
	err = os.Mkdir(dir, 0o755)
	if err == nil {
		err = os.WriteFile(file, nil, 0o600)
	}
	if err == nil {
		err = os.Truncate(file, bytes+bytes/8+512<<20)
	}
	if err == nil {
		err = command(ctx, "mkfs.xfs", "-q", "-m", "reflink=1", file)
	}
	if err == nil {
		err = command(ctx, "mount", "-o", "loop", file, dir)
	}
	if err != nil {
		return "", nil, errors.Join(err, end())
	}
	return dir, end, nil
}

// flat makes the chain of eight layers on such a filesystem.
func (s *imageStore) flat(ctx context.Context, img *image) error {
	dir, end, err := s.sharing(ctx, img.name, 2*s.size)
	if err != nil {
		return err
	}
	img.end = end
	sub := *s
	sub.dir = dir
	if err := sub.chain(ctx, img, 8); err != nil {
		return errors.Join(err, end())
	}
	return nil
}
