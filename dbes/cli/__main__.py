from dbes.cli import main

main()
